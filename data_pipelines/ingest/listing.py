"""What a user's folder or list of files holds: one item per picture or clip, in a fixed order.

folder          files with sidecars, `a.jpg a.txt a.json`; without any, class folders, `cat/1.jpg`
imagefolder     a folder with metadata.csv, .jsonl or .parquet, also one per split
list            a .csv, .tsv, .jsonl or .parquet with a column of paths; rows of a path that differ
                in the caption alone are captions of one sample
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.tar_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from xray.errors import ConfigError

Row = dict[str, Any]

PATH_COLUMNS = (
    *("file_name", "filepath", "file", "path", "image", "image_path", "video", "video_path"),
    "filename",
)
CAPTION_COLUMNS = ("caption", "captions", "text", "description", "title")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Pictures and clips that nothing here reads: listed, so that they are reported and not lost.
UNREAD = ("heic", "heif", "jp2", "jxl", "svg", "wmv", "flv", "3gp", "ogv", "mts")
MEDIA = frozenset((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, *UNREAD))
WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")


@dataclass(frozen=True)
class Item:
    """One file to pack: its path, its name relative to the input, and what is said about it."""

    path: Path
    name: str
    meta: Row = field(default_factory=dict)
    sidecars: tuple[Path, ...] = ()
    listed: bool = True  # False: a file that its folder's metadata passes over

    def stamp(self) -> str:
        """A line that changes when the file, its sidecars or its metadata do."""
        states = [_state(path) for path in (self.path, *self.sidecars)]
        return json.dumps([self.name, self.meta, states], default=str)

    def describe(self) -> tuple[list[str], Row]:
        """Captions and metadata, sidecars read; raises BadSample for a broken json file."""
        meta, captions = dict(self.meta), []
        for path in self.sidecars:
            text = path.read_text("utf-8-sig", errors="replace")
            if path.suffix == ".txt":
                captions = _texts(text.splitlines())
            else:
                meta |= _parse_sidecar(path.name, text)
        return captions or _captions_of(meta), meta


def list_items(source: Path) -> list[Item]:
    """The files that a folder or list names; raises ConfigError where it is neither."""
    source = source.absolute()
    if source.is_dir():
        return _list_folder(source)
    if not source.is_file():
        raise ConfigError(f"{source} does not exist")
    _refuse_shards(source, [source.name])
    if source.suffix.lower() not in READERS:
        endings = ", ".join(READERS)
        raise ConfigError(f"{source} is neither a folder nor a list of files ({endings})")
    return _list_table(source, source.parent, "")


def _refuse_shards(source: Path, names: list[str]) -> None:
    if any(name.lower().endswith(".tar") for name in names):
        raise ConfigError(
            f"{source} already holds .tar shards: use them as they are as data.sources.NAME.shards"
        )


def _list_folder(root: Path) -> list[Item]:
    names = _walk(root)
    _refuse_shards(root, names)
    tables: dict[str, str] = {}  # one per folder: metadata.csv before .jsonl before .parquet
    for name in names:
        folder, base = posixpath.split(name)
        if base in METADATA:
            tables.setdefault(folder, name)
    media = [name for name in names if _ending(name) in MEDIA]
    if tables:
        rows = [_list_table(root / name, root, folder) for folder, name in tables.items()]
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


def _walk(root: Path) -> list[str]:
    """Files below a folder that are not hidden, relative to it, sorted."""

    def fail(error: OSError) -> None:
        raise error

    names = []
    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        names += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _sidecars(root: Path, name: str, present: set[str]) -> tuple[Path, ...]:
    stem = posixpath.splitext(name)[0]
    return tuple(root / f"{stem}{e}" for e in (".json", ".txt") if f"{stem}{e}" in present)


def _list_table(path: Path, root: Path, folder: str) -> list[Item]:
    """The files of a table's rows; paths are relative to `folder`, which is relative to root."""
    rows = READERS[path.suffix.lower()](path)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    known = [column for column in PATH_COLUMNS if column in columns]
    if rows and not known:
        raise ConfigError(
            f"{path} has no column of paths: rename one of its columns "
            f"({', '.join(columns)}) to {PATH_COLUMNS[0]}"
        )
    items = []
    for number, row in enumerate(rows, start=1):
        name = row.pop(known[0], None)
        if name is not None and not isinstance(name, str):
            kind = type(name).__name__
            raise ConfigError(f"column {known[0]!r} of {path} holds {kind}, not paths of files")
        name = posixpath.normpath(posixpath.join(folder, name or f"(row {number} names no file)"))
        if name.startswith(f"{root.as_posix()}/"):
            name = Path(name).relative_to(root).as_posix()
        items.append(Item(root / name, name, row))
    return _joined(items)


def _joined(items: list[Item]) -> list[Item]:
    """Rows of a file that differ in nothing but their caption, made one, in order of the first."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        rest = {key: value for key, value in item.meta.items() if key not in CAPTION_COLUMNS}
        groups.setdefault(json.dumps([item.name, rest], default=str), []).append(item)
    found = []
    for first, *others in groups.values():
        if others:
            texts = [text for item in (first, *others) for text in _captions_of(item.meta)]
            rest = {k: v for k, v in first.meta.items() if k not in CAPTION_COLUMNS}
            first = replace(first, meta={**rest, "captions": list(dict.fromkeys(texts))})
        found.append(first)
    return found


def _read_csv(path: Path) -> list[Row]:
    """Rows of a .csv or .tsv; a column of whole numbers becomes one, as `label` has to be."""
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
            raise ConfigError(
                f"{path} line {reader.reader.line_num}: {error}; "
                "quote cells that hold delimiters or quotes"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: convert it") from error
    for column in set(reader.fieldnames or ()) - set(CAPTION_COLUMNS):
        filled = [row for row in rows if row[column]]
        if all(WHOLE.fullmatch(row[column]) for row in filled):
            for row in filled:
                row[column] = int(row[column])
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: convert it") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path} line {number} is not json: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path} line {number} is not a json object")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} cannot be read as parquet: {error}") from error
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def _state(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _captions_of(meta: Row) -> list[str]:
    """Those of the first column of captions that has some."""
    return next(filter(None, (_texts(meta.get(column)) for column in CAPTION_COLUMNS)), [])


def _texts(value: Any) -> list[str]:
    """The texts of a field that may be a text, a list of texts, or anything else."""
    lines = value if isinstance(value, list) else [value]
    return [line.strip() for line in lines if isinstance(line, str) and line.strip()]


def _parse_sidecar(name: str, text: str) -> Row:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise BadSample("broken json", f"{name}: {error}") from error
    if not isinstance(content, dict):
        raise BadSample("broken json", f"{name} is not a json object")
    return content
