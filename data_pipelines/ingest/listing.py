"""Lists the pictures and clips of a folder or a table, with their captions and metadata.

Tables: .csv, .tsv, .jsonl and .parquet files with a column of paths. Rows with the same path that
differ only in their captions become one sample with all captions. Folders have one of these forms:

sidecars        a.jpg a.txt a.json
class folders   cat/1.jpg dog/1.jpg, where no file has a sidecar
imagefolder     metadata.csv, .jsonl or .parquet in the folder, or one per split
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipelines.shards.tar_contents import compressed, is_compressed_tar
from data_pipelines.shards.tar_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from xray.errors import BadSample, DataError, brief

Row = dict[str, Any]

CAPTION_COLUMNS = ("caption", "captions", "text", "description", "title")
# Pictures and clips that cannot be decoded here: they are listed, so that they are reported.
UNREAD = ("heic", "heif", "jp2", "jxl", "svg", "wmv", "flv", "3gp", "ogv", "mts")
MEDIA = frozenset((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, *UNREAD))


@dataclass(frozen=True)
class Item:
    """A picture or clip: its path, its name relative to the input, its metadata and sidecars."""

    path: Path
    name: str
    meta: Row = field(default_factory=dict)
    sidecars: tuple[Path, ...] = ()
    listed: bool = True  # False: no row of its folder's metadata file names it
    row: int = 0  # number of its row in a list or a metadata file; 0 = no row

    def stamp(self) -> str:
        """Return a line that changes when the file, its sidecars or its metadata change."""
        states = [_state(path) for path in (self.path, *self.sidecars)]
        return json.dumps([self.name, self.meta, states], default=str)

    def with_captions(self, captions: Sequence[str]) -> Item:
        """Return this item with these captions instead of those of its metadata."""
        rest = {key: value for key, value in self.meta.items() if key not in CAPTION_COLUMNS}
        return replace(self, meta={**rest, "captions": list(captions)})

    def describe(self) -> tuple[list[str], Row]:
        """Read captions and metadata, sidecars included; raises BadSample for broken json."""
        meta, captions = dict(self.meta), []
        for path in self.sidecars:
            text = path.read_text("utf-8-sig", errors="replace")
            if path.suffix == ".txt":
                captions = texts_in(text.splitlines())
            else:
                meta |= _parse_sidecar(path.name, text)
        return captions or captions_in(meta), meta


def ending_of(name: str) -> str:
    """Return the ending of a file name: lower case, without the dot."""
    return posixpath.splitext(name)[1][1:].lower()


def captions_in(meta: Row) -> list[str]:
    """Return the captions of the first caption column that is not empty."""
    return next(filter(None, (texts_in(meta.get(column)) for column in CAPTION_COLUMNS)), [])


def texts_in(value: Any) -> list[str]:
    """Return the texts of a field that holds a text, a list of texts, or anything else."""
    lines = value if isinstance(value, list) else [value]
    return [line.strip() for line in lines if isinstance(line, str) and line.strip()]


def _state(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _parse_sidecar(name: str, text: str) -> Row:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise BadSample("broken json", f"{name}: {error}") from error
    if not isinstance(content, dict):
        raise BadSample("broken json", f"{name} is not a json object")
    return content


PATH_COLUMNS = (
    *("file_name", "filepath", "file", "path", "image", "image_path", "video", "video_path"),
    "filename",
)
WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")


def list_table(where: str) -> list[Item]:
    """Return the files that a table names; relative paths start at the table's folder."""
    path = Path(where).absolute()
    return rows_of_table(path, path.parent, "")


def rows_of_table(path: Path, root: Path, folder: str) -> list[Item]:
    """Return the files of a table's rows.

    Paths are relative to `folder`, which is relative to `root`. Raises DataError for a table that
    cannot be read or has no column of paths.
    """
    try:
        rows = READERS[ending_of(path.name)](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or brief(error)}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    known = [column for column in PATH_COLUMNS if column in columns]
    if not known:
        raise DataError(
            f"{path} has no column of paths: rename one of its columns "
            f"({', '.join(columns)}) to {PATH_COLUMNS[0]}"
        )
    items = []
    for number, row in enumerate(rows, start=1):
        name = row.pop(known[0], None)
        if name is not None and not isinstance(name, str):
            raise DataError(
                f"{path}, data row {number}: column {known[0]!r} must hold the path of a file, not "
                f"a value of type {type(name).__name__}"
            )
        name = posixpath.normpath(posixpath.join(folder, name or f"(row {number} names no file)"))
        if name.startswith(f"{root.as_posix()}/"):
            name = Path(name).relative_to(root).as_posix()
        items.append(Item(root / name, name, row, row=number))
    return _joined(items)


def _joined(items: list[Item]) -> list[Item]:
    """Merge the rows of a file that differ only in their caption; the first row sets the order."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        rest = {key: value for key, value in item.meta.items() if key not in CAPTION_COLUMNS}
        groups.setdefault(json.dumps([item.name, rest], default=str), []).append(item)
    joined = []
    for group in groups.values():
        texts = dict.fromkeys(text for item in group for text in captions_in(item.meta))
        joined.append(group[0].with_captions([*texts]) if len(group) > 1 else group[0])
    return joined


def _read_csv(path: Path) -> list[Row]:
    """Read a .csv or .tsv; convert columns of whole numbers to integers, which `label` needs."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Strict: a stray quote would otherwise swallow the rows up to the next one.
        reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            rows: list[Row] = []
            for row in reader:
                if None in row:
                    raise csv.Error("more cells than the header")
                rows.append(dict(row))
        except csv.Error as error:
            raise DataError(
                f"{path} line {reader.reader.line_num}: {error}; "
                "quote cells that hold delimiters or quotes"
            ) from error
    for column in set(rows[0] if rows else ()) - set(CAPTION_COLUMNS):
        filled = [row for row in rows if row[column]]
        if all(WHOLE.fullmatch(row[column]) for row in filled):
            for row in filled:
                row[column] = int(row[column])
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is not json: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is not a json object")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    "csv": _read_csv,
    "tsv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def list_folder(where: str) -> list[Item]:
    """Return the pictures and clips below a folder, sorted; raises DataError for .tar shards."""
    root = Path(where).absolute()
    names = sorted(_walk(root))
    tars = [name for name in names if name.endswith(".tar")]
    if tars:
        raise DataError(
            f"{where} contains .tar shards below it, such as {tars[0]}: give their folder, or a "
            f"pattern such as '{where}/*/*.tar'"
        )
    tables: dict[str, str] = {}  # one per folder: metadata.csv before .jsonl before .parquet
    for name in names:
        folder, base = posixpath.split(name)
        if base in METADATA:
            tables.setdefault(folder, name)
    media = [name for name in names if ending_of(name) in MEDIA]
    if not media and not tables:
        if packed := [name for name in names if is_compressed_tar(name)]:
            raise DataError(compressed(f"{where}/{packed[0]}"))
        raise DataError(f"{where} contains neither .tar shards nor pictures or clips")
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
