"""Lists of files: .csv, .tsv, .jsonl and .parquet tables with a column of paths.

Rows with the same path that differ only in their captions become one sample with all captions.
"""

from __future__ import annotations

import csv
import json
import posixpath
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_pipelines.ingest.items import CAPTION_COLUMNS, Item, Row, captions_in
from xray.errors import DataError, brief

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
        rows = READERS[path.suffix.lower()](path)
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
            kind = type(name).__name__
            raise DataError(f"column {known[0]!r} of {path} holds {kind}, not paths of files")
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
    for first, *others in groups.values():
        if others:
            texts = [text for item in (first, *others) for text in captions_in(item.meta)]
            rest = {k: v for k, v in first.meta.items() if k not in CAPTION_COLUMNS}
            first = replace(first, meta={**rest, "captions": list(dict.fromkeys(texts))})
        joined.append(first)
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
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
