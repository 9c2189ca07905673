"""Rows of tables that name files or hold them: .csv, .tsv, .jsonl, .json and .parquet.

Columns that are known (`table_columns`) may be spelled with capitals: `Caption` is read as
`caption`. A .txt file is a table if it has the form of a caption file (`caption_files`).
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.ingest.caption_files import (
    as_captions,
    has_comments,
    is_caption_file,
    is_numbered,
    numbered_rows,
    of_crossmodal,
    read_json,
    unquoted_rows,
)
from data_pipelines.ingest.endings import ending_of
from data_pipelines.ingest.parquet_tables import read_parquet
from data_pipelines.ingest.table_columns import (
    CAPTION_COLUMNS,
    PATH_COLUMNS,
    Row,
    TableKeys,
    check_once,
    with_known_names,
)
from xray.errors import DataError, brief
from xray.files import decode_text, lines_of

WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")
WHOLE_FLOAT = re.compile(r"-?\d{1,15}\.0*")  # pandas writes numbers so if a cell is empty
LONGEST_CELL = 1 << 30  # characters in a .csv; Python's own limit is below that of long captions


def is_table(where: str) -> bool:
    """Return True for the name of a table, and for a .txt file with the form of one."""
    ending = ending_of(where)
    return ending in READERS and (ending != "txt" or is_caption_file(where))


def read_table(path: Path, keys: TableKeys) -> list[Row]:
    """Read the rows of a table; raises DataError if it cannot be read or has none."""
    try:
        rows = READERS[ending_of(path.name)](path, keys)
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
    check_once(key for key, _ in pairs)
    return dict(pairs)


# text tables ----------------------------------------------------------------------------------


def _text_of(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} {error}") from error


def _read_csv(path: Path, keys: TableKeys) -> list[Row]:
    """Read a .csv or .tsv; convert columns of whole numbers to integers, which `label` needs."""
    text = _text_of(path)
    if is_numbered(lines_of(text)[0]):
        return numbered_rows(path, text)
    tsv = path.suffix.lower() == ".tsv"
    delimiter = keys.separator() or ("\t" if tsv else _delimiter(text))
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
        columns = [name.strip() for name in reader.fieldnames or ()]
        check_once(columns)
        if has_comments(columns) and delimiter == "|":
            return list(map(as_captions, unquoted_rows(columns, lines_of(text)[1:], delimiter)))
        for row in reader:
            if None in row:
                raise csv.Error("more cells than the header")
            rows.append(with_known_names(row))
    except csv.Error as error:
        if path.suffix.lower() == ".txt" and columns[-1].casefold() in CAPTION_COLUMNS:
            return unquoted_rows(columns, lines_of(text)[1:], delimiter)
        raise DataError(
            f"{path} line {reader.reader.line_num}: {error}; "
            "quote cells that hold delimiters or quotes"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return list(map(as_captions, rows)) if has_comments(columns) else rows


def _delimiter(text: str) -> str:
    """Return the delimiter that gives a column of paths or, if none does, the most columns."""
    header = lines_of(text)[0]

    def columns(delimiter: str) -> tuple[bool, int]:
        names = [name.strip(' "').casefold() for name in header.split(delimiter)]
        return any(name in PATH_COLUMNS for name in names), len(names)

    return max((",", ";", "\t", "|"), key=columns)


def _read_jsonl(path: Path, keys: TableKeys) -> list[Row]:
    rows = []
    for number, line in enumerate(lines_of(_text_of(path)), start=1):
        if line.strip():
            try:
                rows.append(of_crossmodal(parse_object(line)))
            except ValueError as error:
                raise DataError(f"{path} line {number} is {error}") from error
    return rows


READERS: dict[str, Callable[[Path, TableKeys], list[Row]]] = {
    "csv": _read_csv,
    "tsv": _read_csv,
    "txt": _read_csv,
    "token": _read_csv,
    "jsonl": _read_jsonl,
    "json": lambda path, keys: read_json(path),
    "parquet": read_parquet,
}
