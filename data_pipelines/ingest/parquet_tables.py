"""Rows of .parquet tables, which may hold files in a column of bytes or of {bytes, path}."""

from __future__ import annotations

import functools
import logging
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_pipelines.ingest.endings import MEDIA, ending_of, ending_of_bytes
from data_pipelines.ingest.table_columns import (
    PATH_COLUMNS,
    Row,
    TableKeys,
    check_once,
    matching,
    with_known_names,
)
from xray.errors import BadSample, DataError, brief

log = logging.getLogger("xray")


@dataclass(frozen=True)
class Cell:
    """File in a cell of a parquet table: its column, and a name made of its row and its path."""

    column: str
    name: str


def read_parquet(path: Path, keys: TableKeys) -> list[Row]:
    """Read the rows of a table, without the bytes: a file in a cell becomes a `Cell`."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            return [with_known_names(row) for row in _rows_of(table, path, keys)]
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {brief(error)}") from error


def _rows_of(table: Any, path: Path, keys: TableKeys) -> list[Row]:
    schema = table.schema_arrow
    check_once(schema.names)
    read = [column.name for column in schema if not _has_bytes(column.type)]
    files = _file_column(schema, keys.image_key)
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


def _file_column(schema: Any, key: str) -> str:
    """Return the column that holds files: the one that a key names, one with a known name, or the
    only one of {bytes, ...}; "" if there is none.
    """
    held = {column.name for column in schema if _holds_files(column.type)}
    if key:
        return matching(sorted(held), key)
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
