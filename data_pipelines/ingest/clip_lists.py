"""Lists of clips as Kinetics and MSR-VTT are distributed, whose rows name clips and not files.

Kinetics         .csv with label, youtube_id, time_start, time_end, split: ID_000010_000020.mp4
MSR-VTT          .json with videos and sentences (`caption_files`): video7010.mp4
MSR-VTT 1k-A     .csv with key, vid_key, video_id, sentence: video7010.mp4

The clips are looked for in the folder of the list and below it, with any ending of a clip. If the
folder is named `annotations`, as Kinetics has it, they may be beside it. Some of them are always
missing, because they were taken off the web.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_pipelines.ingest.endings import MEDIA, ending_of
from data_pipelines.ingest.parquet_tables import Cell
from data_pipelines.ingest.table_columns import PATH_COLUMNS, Row, has_urls, names_files
from data_pipelines.ingest.walk import walk
from xray.errors import DataError
from xray.words import count, some_of

log = logging.getLogger("xray")
TIMES = ("time_start", "time_end")  # of Kinetics: seconds
KINETICS = {"youtube_id", *TIMES}
SENTENCE = "sentence"  # of MSR-VTT 1k-A
CAPTIONED = {SENTENCE, "caption", "captions"}
ANNOTATIONS = "annotations"  # folder of lists beside the folders of the clips


def is_clip_list(rows: Sequence[Row]) -> bool:
    """Return True for rows that name clips by YouTube id and times, or captioned ones by id.

    A table with a column of files, or that holds the files, is no such list.
    """
    columns = rows[0].keys()
    captioned = "video_id" in columns and not columns.isdisjoint(CAPTIONED)
    if not (columns >= KINETICS or captioned) or not columns.isdisjoint(PATH_COLUMNS):
        return False
    if any(isinstance(value, Cell) for value in rows[0].values()):
        return False
    return not any(names_files(rows, own) and not has_urls(rows, own) for own in columns)


def with_clips(path: Path, root: Path, rows: Sequence[Row]) -> tuple[Path, list[Row]]:
    """Return the folder of the clips of a list, and its rows with `file_name`, relative to it.

    Raises DataError for a row without an id or times, and if none of the clips is there.
    """
    stems = [_stem(path, number, row) for number, row in enumerate(rows, start=1)]
    places = [root, root.parent] if root.name == ANNOTATIONS else [root]
    for place in places:
        if found := _find(place, set(stems)):
            named = zip(stems, rows, strict=True)
            return place, [
                row | {"file_name": found.get(stem, f"{stem}.mp4")} for stem, row in named
            ]
    raise DataError(
        f"{path}: none of its {count(len({*stems}), 'clip')} is in {places[-1]}, such as "
        f"{stems[0]}.mp4: put the list beside the folder of the clips"
    )


def _stem(path: Path, number: int, row: Row) -> str:
    """Return the name of a row's clip, without its ending."""
    try:
        if row.keys() >= KINETICS:
            start, end = (int(float(row[name])) for name in TIMES)
            name = row["youtube_id"]
            stem = f"{name}_{start:06d}_{end:06d}" if name not in ("", None) else ""
        else:
            stem = str(row.get("video_id") or "")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path}, data row {number}: {' and '.join(TIMES)} must be numbers of seconds"
        ) from error
    if not stem:
        raise DataError(f"{path}, data row {number}: it names no clip")
    return stem


def _find(root: Path, stems: set[str]) -> dict[str, str]:
    """Find clips by their names without endings, below a folder."""
    found: dict[str, str] = {}
    for name in walk(root):
        stem = posixpath.splitext(posixpath.basename(name))[0]
        if stem in stems and ending_of(name) in MEDIA:
            found.setdefault(stem, name)
    return found


def tell_missing(what: str, missing: Iterable[str], listed: int) -> None:
    """Log how many of the clips that a list names are missing, and some of their names."""
    if names := list(missing):
        log.warning(
            "%s: %s of %s are missing and left out: %s",
            *(what, f"{len(names):,}", count(listed, "listed clip"), some_of(names)),
        )
