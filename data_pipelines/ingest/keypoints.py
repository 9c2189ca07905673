"""Pairs of pictures with keypoints that correspond, from a table with a row per keypoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.ingest.labelled import place_of
from data_pipelines.ingest.listing import Item
from data_pipelines.ingest.plain_files import Request, source_of_files
from data_pipelines.ingest.table_columns import TableKeys
from data_pipelines.ingest.tables import is_table, read_table
from data_pipelines.shards.source import Source
from xray.errors import DataError

PICTURES = ("source", "target")
POINTS = ("source_x", "source_y", "target_x", "target_y")
SIZE = "size"


@dataclass(frozen=True)
class KeypointPairs:
    """P pairs of pictures with K keypoints in all.

    source: the pictures, each once. pictures [P, 2]: numbers of a pair's source and target picture.
    pair [K]: pair of a keypoint. points [K, 4]: its x and y in the source and in the target, in
    pixels. sizes [K]: pixels that the threshold is a share of; NaN = the target's larger side.
    where: the table; the row of a keypoint is its number from 1.
    """

    source: Source
    pictures: np.ndarray
    pair: np.ndarray
    points: np.ndarray
    sizes: np.ndarray
    where: str


def open_pairs(key: str, pattern: str, root: str) -> KeypointPairs:
    """Read a table of keypoints; raises DataError for one that cannot be used.

    Its columns are source and target, paths relative to the table, POINTS, and optionally SIZE.
    key: of the config.
    """
    where = place_of(key, pattern, root)
    try:
        if not is_table(where):
            raise DataError(f"{where} is not a table (.csv, .tsv, .jsonl, .json, .parquet)")
        rows = read_table(Path(where), TableKeys())
        for column in (*PICTURES, *POINTS):
            if column not in rows[0]:
                raise DataError(f"{where} has no column {column!r}")
        folder = Path(os.path.dirname(os.path.abspath(where)))
        items: dict[str, Item] = {}
        pairs: dict[tuple[str, ...], int] = {}
        pair = np.empty(len(rows), np.int64)
        for number, row in enumerate(rows):
            names = tuple(str(row[column]) for column in PICTURES)
            for name in {*names} - items.keys():
                items[name] = Item(folder / name, name)
                if not (folder / name).is_file():
                    raise DataError(f"{where}, data row {number + 1}: no file {folder / name}")
            pair[number] = pairs.setdefault(names, len(pairs))
        points = np.array([_numbers(where, n, row, POINTS) for n, row in enumerate(rows, 1)])
        with_size = [row if row.get(SIZE) not in (None, "") else {SIZE: math.nan} for row in rows]
        sizes = np.array([_numbers(where, n, row, [SIZE]) for n, row in enumerate(with_size, 1)])
        files = source_of_files(
            [items[name] for name in sorted(items)], where, str(folder), Request(key, "image")
        )
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    places = {item.name: number for number, item in enumerate(files.items)}
    if other := [name for name in items if name not in places]:
        raise DataError(f"{key}: {where} names {other[0]}, which is not a picture")
    pictures = np.array([[places[name] for name in names] for names in pairs])
    return KeypointPairs(files, pictures, pair, points, sizes[:, 0], where)


def _numbers(
    where: str, number: int, row: Mapping[str, Any], columns: Sequence[str]
) -> list[float]:
    """Read the numbers in some cells of a row."""
    for column in columns:
        try:
            float(row[column])
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}, data row {number}: {column}={row[column]!r} is not a number"
            ) from error
    return [float(row[column]) for column in columns]
