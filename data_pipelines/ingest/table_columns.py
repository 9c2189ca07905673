"""Columns of a table: which one names the files, which one has their captions."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.ingest.endings import MEDIA, ending_of
from xray.config import nearest
from xray.errors import ConfigError, DataError

Row = dict[str, Any]

CAPTION_COLUMNS = ("caption", "captions", "text", "description", "title")
LABELS = ("label_name", "label")
PATH_COLUMNS = (
    *("file_name", "filepath", "file", "path", "image", "image_path", "video", "video_path"),
    "filename",
)
KNOWN = frozenset((*CAPTION_COLUMNS, *LABELS, *PATH_COLUMNS))
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
DELIMITERS = {"tab": "\t", "\\t": "\t"}  # their names on a command line


@dataclass
class TableKeys:
    """Settings of a table whose columns, delimiter or folder of files are not found by themselves.

    Columns may be spelled with other capitals.
    """

    image_key: str = ""  # column of a table that names the files; "" = by its name or content
    caption_key: str = ""  # column of captions; "" = caption, captions, text, description or title
    root: str = ""  # folder that the paths in a table are relative to; "" = the table's own
    delimiter: str = ""  # of a .csv: one character, or tab; "" = found in its first line

    def given(self) -> list[str]:
        """Return the keys that are set, as `key=value`."""
        keys = ("image_key", "caption_key", "root", "delimiter")
        return [f"{key}={getattr(self, key)}" for key in keys if getattr(self, key)]

    def separator(self) -> str:
        """Return the delimiter as a character, "" if it is not set; raises ConfigError."""
        character = DELIMITERS.get(self.delimiter, self.delimiter)
        if len(character) > 1 or character in ('"', "\n", "\r"):
            raise ConfigError(f"delimiter={self.delimiter}: give one character, or tab")
        return character


def with_known_names(row: Row) -> Row:
    """Return a row whose known columns have their usual spelling, unless it has both spellings."""
    names: dict[str, str] = {}
    for column in row:
        plain = column.strip().casefold()
        if plain in KNOWN and plain not in row and plain not in names.values():
            names[column] = plain
    return {names.get(column, column): value for column, value in row.items()}


def check_once(columns: Iterable[str]) -> None:
    """Raise ValueError for a column that occurs twice."""
    twice = next((name for name, n in Counter(columns).items() if n > 1 and name), None)
    if twice is not None:
        raise ValueError(f"column {twice!r} occurs twice: rename one of them")


def matching(columns: Collection[str], key: str) -> str:
    """Return the column that a key names, up to spaces and capitals; "" if there is none."""
    if key in columns:
        return key
    plain = key.strip().casefold()
    return next((name for name in columns if name.strip().casefold() == plain), "")


def file_column(path: Path, rows: Sequence[Row], key: str, held: Collection[str]) -> str:
    """Return the column of a table that names files, or holds them (`held`).

    It is the one that `key` names, or has a known name, or the only one whose cells end as
    pictures or clips do. Raises ConfigError for a key without a column, DataError if there is no
    such column, or if it has URLs.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if key:
        found = [_named(path, columns, "image_key", key)]
    else:
        found = [*held, *(column for column in PATH_COLUMNS if column in columns)]
        found = found or [column for column in columns if names_files(rows, column)]
    places = [column for column in found if column in held or not has_urls(rows, column)]
    urls = [column for column in columns if has_urls(rows, column)]
    if not places and urls:
        raise DataError(_download(path, found[0] if found else urls[0], columns))
    known = key or (places and (places[0] in held or places[0] in PATH_COLUMNS))
    if not places or (len(places) > 1 and not known):
        raise DataError(_which(path, columns, places))
    return places[0]


def _named(path: Path, columns: Sequence[str], setting: str, key: str) -> str:
    column = matching(columns, key)
    if not column:
        there = ", ".join(columns)
        raise ConfigError(
            f"{setting}={key}: {path} has no such column{nearest(key, columns)}; it has {there}"
        )
    return column


def _filled(rows: Sequence[Row], column: str) -> list[Any]:
    return [row[column] for row in rows if row.get(column) not in (None, "")]


def names_files(rows: Sequence[Row], column: str) -> bool:
    """Return True if all cells of a column end as pictures or clips do."""
    cells = _filled(rows, column)
    return bool(cells) and all(isinstance(c, str) and ending_of(c) in MEDIA for c in cells)


def has_urls(rows: Sequence[Row], column: str) -> bool:
    """Return True if the first filled cell of a column is a URL."""
    first = next(iter(_filled(rows, column)), None)
    return isinstance(first, str) and bool(URL.match(first))


def _download(path: Path, column: str, columns: Sequence[str]) -> str:
    """Return the error about a table of URLs."""
    captions = [name for name in columns if name.strip().casefold() in CAPTION_COLUMNS]
    more = f"--caption_col {shlex.quote(captions[0])} " if captions else ""
    form, own = ending_of(path.name), shlex.quote(str(path))
    return (
        f"{path}: column {column!r} has URLs, and xray reads files: download them, for example "
        f"with img2dataset, whose shards xray reads: img2dataset --url_list {own} "
        f"--input_format {form} --url_col {shlex.quote(column)} {more}--output_format webdataset "
        f"--output_folder {shlex.quote(str(path.with_suffix('')) + '_shards')}"
    )


def _which(path: Path, columns: Sequence[str], places: Sequence[str]) -> str:
    """Return the error about a table without a column of files, or with several."""
    out = shlex.quote(str(path.with_suffix("")) + "_shards")
    command = f"xray data pack {shlex.quote(str(path))} {out}"
    if places:
        what = f"has several columns of files ({', '.join(places)})"
    else:
        what = f"has no column of files: its columns are {', '.join(columns)}"
    other = ", or delimiter= if these are not its columns" if len(columns) == 1 else ""
    return f"{path} {what}: name one of them with image_key={other}, as in {command} image_key=..."


def with_captions(path: Path, rows: list[Row], key: str) -> list[Row]:
    """Return rows whose captions are those of the column that a key names, under `caption`.

    A row without one has no caption, whatever its other columns have. Raises ConfigError.
    """
    if not key:
        return rows
    columns = list(dict.fromkeys(column for row in rows for column in row))
    column = _named(path, columns, "caption_key", key)
    result = []
    for row in rows:
        rest = {name: value for name, value in row.items() if name != column}
        own = row.get(column)
        dropped = ("caption", "captions") if own not in (None, "") else CAPTION_COLUMNS
        rest = {name: value for name, value in rest.items() if name not in dropped}
        result.append({**rest, "caption": own} if own not in (None, "") else rest)
    return result
