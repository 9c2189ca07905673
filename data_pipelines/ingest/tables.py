"""Rows of tables that name files or hold them: .csv, .tsv, .jsonl and .parquet.

Columns that are known here may be spelled with capitals: `Caption` is read as `caption`. A .parquet
table may hold the files themselves, in a column of bytes or of {bytes, path} (Hugging Face).
"""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_pipelines.ingest.endings import MEDIA, ending_of, ending_of_bytes
from xray.errors import BadSample, DataError, brief
from xray.files import decode_text, lines_of

log = logging.getLogger("xray")
Row = dict[str, Any]

CAPTION_COLUMNS = ("caption", "captions", "text", "description", "title")
LABELS = ("label_name", "label")
PATH_COLUMNS = (
    *("file_name", "filepath", "file", "path", "image", "image_path", "video", "video_path"),
    "filename",
)
KNOWN = frozenset((*CAPTION_COLUMNS, *LABELS, *PATH_COLUMNS))
WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")
WHOLE_FLOAT = re.compile(r"-?\d{1,15}\.0*")  # pandas writes numbers so if a cell is empty
LONGEST_CELL = 1 << 30  # characters in a .csv; Python's own limit is below that of long captions


def read_table(path: Path) -> list[Row]:
    """Read the rows of a table; raises DataError if it cannot be read or has none."""
    try:
        rows = READERS[ending_of(path.name)](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or brief(error)}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    for row in rows:
        if "label" in row:
            row["label"] = whole_number(row["label"])
    return rows


def whole_number(value: Any) -> Any:
    """Convert a float that is whole to an integer, and NaN to None; others do not change."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else int(value) if value.is_integer() else value


def with_known_names(row: Row) -> Row:
    """Return a row whose known columns have their usual spelling, unless it has both spellings."""
    names: dict[str, str] = {}
    for column in row:
        plain = column.strip().casefold()
        if plain in KNOWN and plain not in row and plain not in names.values():
            names[column] = plain
    return {names.get(column, column): value for column, value in row.items()}


def parse_object(text: str) -> Row:
    """Parse a JSON object; raises ValueError for other texts, and for a key that occurs twice."""
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not json: {brief(error)}") from error
    if not isinstance(content, dict):
        raise ValueError("not a json object")
    return with_known_names(content)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    _check_once(key for key, _ in pairs)
    return dict(pairs)


def _check_once(columns: Iterable[str]) -> None:
    twice = next((name for name, n in Counter(columns).items() if n > 1 and name), None)
    if twice is not None:
        raise ValueError(f"column {twice!r} occurs twice: rename one of them")


# text tables ----------------------------------------------------------------------------------


def _text_of(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} {error}") from error


def _read_csv(path: Path) -> list[Row]:
    """Read a .csv or .tsv; convert columns of whole numbers to integers, which `label` needs."""
    text = _text_of(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        rows = _parse_csv(path, text, delimiter)
    finally:
        csv.field_size_limit(limit)
    for column in set(rows[0] if rows else ()) - set(CAPTION_COLUMNS):
        filled = [row for row in rows if row[column]]
        forms = (WHOLE, WHOLE_FLOAT) if column == "label" else (WHOLE,)
        if all(any(form.fullmatch(row[column]) for form in forms) for row in filled):
            for row in filled:
                row[column] = int(row[column].partition(".")[0])
    return rows


def _parse_csv(path: Path, text: str, delimiter: str) -> list[Row]:
    # Strict: a stray quote would otherwise swallow the rows up to the next one.
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: list[Row] = []
    try:
        _check_once(reader.fieldnames or ())
        for row in reader:
            if None in row:
                raise csv.Error("more cells than the header")
            rows.append(with_known_names(row))
    except csv.Error as error:
        raise DataError(
            f"{path} line {reader.reader.line_num}: {error}; "
            "quote cells that hold delimiters or quotes"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return rows


def _delimiter(text: str) -> str:
    """Return the delimiter that gives a column of paths or, if none does, the most columns."""
    header = lines_of(text)[0]

    def columns(delimiter: str) -> tuple[bool, int]:
        names = [name.strip(' "').casefold() for name in header.split(delimiter)]
        return any(name in PATH_COLUMNS for name in names), len(names)

    return max((",", ";", "\t"), key=columns)


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(lines_of(_text_of(path)), start=1):
        if line.strip():
            try:
                rows.append(parse_object(line))
            except ValueError as error:
                raise DataError(f"{path} line {number} is {error}") from error
    return rows


# parquet --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """File in a cell of a parquet table: its column, and a name made of its row and its path."""

    column: str
    name: str


def _read_parquet(path: Path) -> list[Row]:
    """Read the rows of a table, without the bytes: a file in a cell becomes a `Cell`."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            return [with_known_names(row) for row in _rows_of(table, path)]
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {brief(error)}") from error


def _rows_of(table: Any, path: Path) -> list[Row]:
    schema = table.schema_arrow
    _check_once(schema.names)
    read = [column.name for column in schema if not _has_bytes(column.type)]
    files = _file_column(schema)
    if lost := [name for name in schema.names if name not in (*read, files)]:
        log.warning("%s: columns of bytes are left out: %s", path, ", ".join(lost))
    if files and _child(schema.field(files).type, "path") is not None:
        read.append(f"{files}.path")
    rows: list[Row] = table.read(columns=read).to_pylist() if read else []
    rows = rows or [{} for _ in range(table.metadata.num_rows)]
    if not files:
        return rows
    paths = [(row.get(files) or {}).get("path") or "" for row in rows]
    if _is_empty(table, files):
        return [{**row, files: path or None} for row, path in zip(rows, paths, strict=True)]
    names = [f"{row}/{path}" if path else str(row) for row, path in enumerate(paths, start=1)]
    if not all(ending_of(name) in MEDIA for name in names):
        names = [
            name if ending_of(name) in MEDIA else f"{name}.{ending_of_bytes(start)}".rstrip(".")
            for name, start in zip(names, _starts(table, files), strict=True)
        ]
    return [{**row, files: Cell(files, name)} for row, name in zip(rows, names, strict=True)]


def _child(kind: Any, name: str) -> Any:
    """Return the type of a struct's field; None if it has none."""
    import pyarrow

    place = kind.get_field_index(name) if pyarrow.types.is_struct(kind) else -1
    return None if place < 0 else kind.field(place).type


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _has_bytes(kind: Any) -> bool:
    """Return True if values of a type are or contain bytes."""
    inner = (kind.field(place).type for place in range(kind.num_fields))
    return _is_bytes(kind) or any(map(_has_bytes, inner))


def _file_column(schema: Any) -> str:
    """Return the column that holds files: one with a known name, or the only one of {bytes, ...}.

    "" if there is none.
    """
    held = {column.name for column in schema if _holds_files(column.type)}
    names = {name.strip().casefold(): name for name in held}
    known = [names[column] for column in PATH_COLUMNS if column in names]
    structs = [name for name in held if not _is_bytes(schema.field(name).type)]
    return next(iter([*known, *(structs if len(structs) == 1 else [])]), "")


def _holds_files(kind: Any) -> bool:
    inner = _child(kind, "bytes")
    return _is_bytes(kind) or (inner is not None and _is_bytes(inner))


def _is_empty(table: Any, column: str) -> bool:
    """Return True if it is recorded that no cell of a column of files holds bytes."""
    leaves = [table.schema.column(place).path for place in range(len(table.schema))]
    leaf = leaves.index(f"{column}.bytes" if f"{column}.bytes" in leaves else column)
    groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
    known = [(group.num_rows, group.column(leaf).statistics) for group in groups]
    return all(facts is not None and facts.null_count == rows for rows, facts in known)


def _bytes_in(array: Any) -> Any:
    """Return the bytes in a column of bytes or of {bytes, ...}."""
    import pyarrow.compute

    return array if _is_bytes(array.type) else pyarrow.compute.struct_field(array, "bytes")


def _starts(table: Any, column: str) -> list[bytes]:
    """Read the first bytes of the files in a column."""
    import pyarrow.compute

    starts: list[bytes] = []
    for batch in table.iter_batches(64, columns=[column]):
        cut = pyarrow.compute.binary_slice(_bytes_in(batch.column(0)), 0, 16)
        starts += [start or b"" for start in cut.to_pylist()]
    return starts


def read_cell(path: Path, column: str, row: int) -> bytes:
    """Read a file in a cell of a table; row: from 0. Raises BadSample for an empty cell."""
    import pyarrow

    try:
        ends = _group_ends(path)
        group = bisect_right(ends, row)
        start = ends[group - 1] if group else 0
        data: bytes | None = _group(path, column, group)[row - start].as_py()
    except (pyarrow.ArrowException, OSError, IndexError, KeyError) as error:
        raise BadSample("unreadable file", f"row {row + 1}: {brief(error)}") from error
    if data is None:
        raise BadSample("missing file", f"row {row + 1}: the cell is empty")
    return data


@functools.lru_cache(maxsize=16)
def _group_ends(path: Path) -> list[int]:
    """Return the number of the last row, plus 1, of each row group of a table."""
    import pyarrow.parquet

    facts = pyarrow.parquet.read_metadata(path)
    return list(accumulate(facts.row_group(n).num_rows for n in range(facts.num_row_groups)))


@functools.lru_cache(maxsize=2)  # rows are read in order
def _group(path: Path, column: str, group: int) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        return _bytes_in(table.read_row_group(group, columns=[column]).column(0))


READERS: dict[str, Callable[[Path], list[Row]]] = {
    "csv": _read_csv,
    "tsv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
