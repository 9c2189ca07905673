"""Tables that ask for the right caption of a picture, one question per row.

pairs       a picture, its caption and a wrong caption, or a list of them (SugarCrepe, ARO)
two by two  two pictures, image_0 and image_1, with caption_0 and caption_1 (Winoground)
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_pipelines.ingest.endings import ending_of
from data_pipelines.ingest.labelled import place_of
from data_pipelines.ingest.listing import Item, folder_of
from data_pipelines.ingest.parquet_tables import Cell
from data_pipelines.ingest.plain_files import FileSource, Request, source_of_files
from data_pipelines.ingest.row_captions import texts_in
from data_pipelines.ingest.table_columns import PATH_COLUMNS, Row, TableKeys
from data_pipelines.ingest.tables import is_table, read_table
from data_pipelines.shards.tar_index import media_extensions
from xray.errors import DataError

RIGHT = ("caption", "true_caption", "right_caption")
WRONG = ("negative_caption", "false_caption", "wrong_caption")
TWO_BY_TWO = ("image_0", "image_1", "caption_0", "caption_1")
CATEGORY = "category"  # default column


class Question(NamedTuple):
    """A row of a table: one picture with its caption and wrong ones, or two pictures."""

    pictures: tuple[int, ...]  # places among the pictures
    captions: tuple[str, ...]  # one picture: the right caption, then wrong ones; two: one of each
    category: str  # "" = none


@dataclass(frozen=True)
class QuestionFiles(FileSource):
    """The pictures of a table, each once, and its questions, all of the same form."""

    questions: Sequence[Question] = field(default=(), repr=False)

    @property
    def two_by_two(self) -> bool:
        """Return True if a question has two pictures."""
        return len(self.questions[0].pictures) == 2


def open_questions(name: str, pattern: str, root: str, category: str) -> QuestionFiles:
    """Open a table of questions; relative paths start at the table, or in a folder beside it.

    category: column of the questions' categories. Raises DataError for a missing column, and for an
    empty cell or a missing picture with its row.
    """
    where = place_of(name, pattern, root)
    if not is_table(where):
        raise DataError(f"{name}: {where} is not a table: give a .csv, .tsv, .json or .jsonl file")
    path = Path(where).absolute()
    rows = read_table(path, TableKeys())
    pictures, right, wrong = _columns(f"{name}: {path}", rows, category)
    names = [[_with_ending(row.get(column)) for column in pictures] for row in rows]
    folder = folder_of(path, path.parent, [name for own in names for name in own])
    items: dict[str, int] = {}
    questions = []
    for number, (row, own) in enumerate(zip(rows, names, strict=True), start=1):
        place = f"{name}: {path}, data row {number}"
        for file, column in zip(own, pictures, strict=True):
            _check_picture(place, path.parent / folder / file, column)
        texts = [texts_in(row.get(column)) for column in (*right, *wrong)]
        for column, found in zip((*right, *wrong), texts, strict=True):
            if not found or (column not in wrong and len(found) > 1):
                raise DataError(f"{place}: {column} is {'several texts' if found else 'empty'}")
        places = tuple(items.setdefault(file, len(items)) for file in own)
        captions = tuple(itertools.chain.from_iterable(texts))
        questions.append(Question(places, captions, str(row.get(category) or "")))
    listed = [Item(path.parent / folder / file, os.path.join(folder, file)) for file in items]
    source = source_of_files(listed, where, str(path.parent), Request(name, "image"))
    return source.as_kind(QuestionFiles, questions=tuple(questions))


def _columns(
    what: str, rows: Sequence[Row], category: str
) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Return the columns of pictures, of right captions, and of wrong captions."""
    columns = dict.fromkeys(column for row in rows for column in row)
    if category != CATEGORY and category not in columns:
        raise DataError(f"{what} has no column {category!r}: it has {', '.join(columns)}")
    if columns.keys() & {*TWO_BY_TWO}:
        if missing := [column for column in TWO_BY_TWO if column not in columns]:
            raise DataError(
                f"{what} has no column {missing[0]!r}: rows of two pictures need "
                f"{', '.join(TWO_BY_TWO)}"
            )
        return TWO_BY_TWO[:2], TWO_BY_TWO[2:], ()
    kinds = {"pictures": PATH_COLUMNS, "right captions": RIGHT, "wrong captions": WRONG}
    found = []
    for kind, names in kinds.items():
        column = next((name for name in names if name in columns), "")
        if not column:
            raise DataError(
                f"{what} has no column of {kind} ({', '.join(names)}): it has {', '.join(columns)}"
            )
        found.append((column,))
    pictures, right, wrong = found
    if isinstance(rows[0].get(pictures[0]), Cell):
        raise DataError(
            f"{what} holds the pictures themselves: write them to files, and their paths"
        )
    return pictures, right, wrong


def _with_ending(name: object) -> str:
    """Return the name of a picture as text; Winoground's have no ending, and are .png files."""
    text = str(name or "")
    return f"{text}.png" if text and not os.path.splitext(text)[1] else text


def _check_picture(place: str, path: Path, column: str) -> None:
    """Raise DataError if a picture is not there or is no picture."""
    if not path.is_file():
        raise DataError(f"{place}: no file {path} ({column})")
    endings = media_extensions("image", "image")
    if ending_of(path.name) not in endings:
        raise DataError(f"{place}: {path.name} is no picture: its ending must be one of {endings}")
