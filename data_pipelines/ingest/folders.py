"""Folders of pictures and clips.

sidecars        a.jpg a.txt a.json
class folders   cat/1.jpg dog/1.jpg, where no file has a sidecar
imagefolder     metadata.csv, .jsonl or .parquet in the folder, or one per split
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_pipelines.ingest.items import MEDIA, Item, ending_of
from data_pipelines.ingest.tables import rows_of_table
from xray.errors import DataError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def list_folder(where: str) -> list[Item]:
    """Return the pictures and clips below a folder, sorted; raises DataError for .tar shards."""
    root = Path(where).absolute()
    names = sorted(_walk(root))
    tars = [name for name in names if name.endswith(".tar")]
    if tars:
        raise DataError(
            f"{where} holds .tar shards below it, such as {tars[0]}: give their folder, or a "
            f"pattern such as '{where}/*/*.tar'"
        )
    tables: dict[str, str] = {}  # one per folder: metadata.csv before .jsonl before .parquet
    for name in names:
        folder, base = posixpath.split(name)
        if base in METADATA:
            tables.setdefault(folder, name)
    media = [name for name in names if ending_of(name) in MEDIA]
    if not media and not tables:
        raise DataError(f"{where} holds neither .tar shards nor pictures or clips")
    if tables:
        rows = [rows_of_table(root / name, root, folder) for folder, name in tables.items()]
        items = [item for table in rows for item in table]
        named = {item.name for item in items}
        others = [name for name in media if name not in named]
        return items + [Item(root / name, name, listed=False) for name in others]
    present = set(names)
    items = [Item(root / name, name, {}, _sidecars(root, name, present)) for name in media]
    if any(item.sidecars for item in items):
        return items
    classes = sorted({posixpath.dirname(name) for name in media if name.count("/") == 1})
    labels = {name: {"label_name": name, "label": i} for i, name in enumerate(classes)}
    return [replace(item, meta=labels.get(posixpath.dirname(item.name), {})) for item in items]


def _walk(root: Path) -> Iterator[str]:
    """Names of the files below a folder, relative to it; hidden files and folders are skipped.

    Links to folders are followed in `root` itself, not below: class folders are often links. A link
    to `root` or to a folder above it is skipped.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    try:
        tops = [entry.name for entry in os.scandir(root) if entry.is_dir() and not loops(entry)]
    except OSError as error:
        fail(error)
    for top in ("", *(name for name in tops if not name.startswith("."))):
        for folder, folders, files in os.walk(root / top, onerror=fail):
            folders[:] = [name for name in folders if top and not name.startswith(".")]
            below = Path(folder).relative_to(root)
            yield from ((below / name).as_posix() for name in files if not name.startswith("."))


def loops(entry: os.DirEntry[str]) -> bool:
    """Return True for a link that leads to its own folder or above it."""
    path = Path(entry.path)
    return entry.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _sidecars(root: Path, name: str, present: set[str]) -> tuple[Path, ...]:
    stem = posixpath.splitext(name)[0]
    return tuple(root / f"{stem}{e}" for e in (".json", ".txt") if f"{stem}{e}" in present)
