"""Caption files of known data sets as they are distributed.

Flickr8k, Flickr30k, COCO, Karpathy's splits, Crossmodal-3600, and SugarCrepe:

captions.txt                  a table: `image,caption`, or `image|comment_number|comment`
Flickr8k.token.txt, .token    no header: `1000268201.jpg#0<TAB>caption`
dataset_coco.json             Karpathy's splits: {"images": [{filename, filepath, sentences}]}
captions_val2014.json         COCO: {"images": [{id, file_name}], "annotations": [{image_id, ...}]}
captions.jsonl                Crossmodal-3600: {"image/key": ..., "en": {"caption": [...]}, ...}
swap_obj.json                 SugarCrepe: {"0": {filename, caption, negative_caption}, ...}
test_videodatainfo.json       MSR-VTT: {"videos": [{video_id}], "sentences": [{video_id, caption}]}
"""

from __future__ import annotations

import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.ingest.endings import MEDIA, ending_of
from data_pipelines.ingest.table_columns import (
    CAPTION_COLUMNS,
    PATH_COLUMNS,
    Row,
    with_known_names,
)
from xray.errors import DataError, brief
from xray.files import decode_text, lines_of

NUMBERED = re.compile(r"\s*(\S.*?)#\d+\t")  # picture, number of its caption, caption
COMMENT = ("comment_number", "comment")  # columns of Flickr30k
FIRST = 1 << 16  # bytes of a file that are read to recognise its form


def is_caption_file(where: str) -> bool:
    """Return True for a text file in one of the forms of Flickr8k and Flickr30k."""
    try:
        with open(where, "rb") as file:
            start = file.read(FIRST)
        head = lines_of(decode_text(start[: start.rfind(b"\n") + 1] or start))[0]
    except (OSError, ValueError, IndexError):
        return False
    if is_numbered(head):
        return True
    cells = max((_cells(head, delimiter) for delimiter in ",|;\t"), key=len)
    files = {*PATH_COLUMNS, "image_name"}
    captions = {*CAPTION_COLUMNS, "comment"}
    return cells[0] in files and any(cell in captions for cell in cells[1:])


def _cells(line: str, delimiter: str) -> list[str]:
    return [cell.strip(' "').casefold() for cell in line.split(delimiter)]


def is_numbered(line: str) -> bool:
    """Return True for a line `picture.jpg#0<TAB>caption`."""
    found = NUMBERED.match(line)
    return found is not None and ending_of(found[1]) in MEDIA


def numbered_rows(path: Path, text: str) -> list[Row]:
    """Read lines `picture.jpg#0<TAB>caption`; raises DataError for another line."""
    rows = []
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        found = NUMBERED.match(line)
        if found is None:
            raise DataError(
                f"{path} line {number}: expected a picture, # and a number, a tab and a caption"
            )
        rows.append({"image": found[1], "caption": line[found.end() :].strip()})
    return rows


def has_comments(columns: Sequence[str]) -> bool:
    """Return True for the columns of Flickr30k, whose cells are never quoted."""
    return set(COMMENT) <= set(columns)


def unquoted_rows(columns: Sequence[str], lines: Sequence[str], delimiter: str) -> list[Row]:
    """Read rows without quoting, whose last column is the rest of the line."""
    rows = []
    for line in lines:
        if line.strip():
            cells = [cell.strip() for cell in line.split(delimiter, len(columns) - 1)]
            cells += [""] * (len(columns) - len(cells))
            rows.append(with_known_names(dict(zip(columns, cells, strict=True))))
    return rows


def as_captions(row: Row) -> Row:
    """Return a row of Flickr30k with its comment as caption, without the comment's number."""
    rest = {name: value for name, value in row.items() if name not in COMMENT}
    return {**rest, "caption": row.get("comment")}


def read_json(path: Path) -> list[Row]:
    """Read a .json list of objects, or that of Karpathy, COCO or MSR-VTT; else DataError."""
    try:
        content = json.loads(decode_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not json: {brief(error)}") from error
    if isinstance(content, Mapping) and content.keys() >= {"videos", "sentences"}:
        return _of_msrvtt(path, content)
    rows = content.get("images") if isinstance(content, Mapping) else content
    if rows is None and content and all(isinstance(row, dict) for row in content.values()):
        rows = [*content.values()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path} is not a list of objects with a path and captions, nor a caption file of "
            'COCO or Karpathy, which have a list "images", nor MSR-VTT\'s, with "videos"'
        )
    if rows and "sentences" in rows[0]:
        return [_of_karpathy(path, row) for row in rows]
    if isinstance(content, Mapping) and isinstance(content.get("annotations"), list):
        return _of_coco(rows, content["annotations"])
    return [with_known_names(row) for row in rows]


def of_crossmodal(row: Row) -> Row:
    """Return a row of Crossmodal-3600 with its picture and its captions by language.

    Other rows do not change. The data set's pictures are KEY.jpg.
    """
    key = row.get("image/key")
    if not isinstance(key, str):
        return row
    captions = {
        language: own["caption"]
        for language, own in row.items()
        if isinstance(own, Mapping) and own.get("caption")
    }
    return {"file_name": f"{key}.jpg", "captions": captions, "locale": row.get("image/locale")}


def _of_karpathy(path: Path, image: Row) -> Row:
    if not isinstance(image.get("filename"), str) or not isinstance(image.get("sentences"), list):
        raise DataError(f"{path}: an entry of images has no filename or no list of sentences")
    name = posixpath.join(str(image.get("filepath") or ""), image["filename"])
    texts = [own.get("raw") for own in image["sentences"] if isinstance(own, Mapping)]
    facts: Row = {key: image[key] for key in ("split", "cocoid") if key in image}
    return {"file_name": name, "captions": [text for text in texts if text], **facts}


def _of_coco(images: Sequence[Row], annotations: Sequence[Any]) -> list[Row]:
    captions: dict[Any, list[str]] = defaultdict(list)
    for own in annotations:
        if isinstance(own, Mapping) and isinstance(own.get("caption"), str):
            captions[own.get("image_id")].append(own["caption"].strip())
    kept = ("file_name", "id")
    return [
        {**{key: image[key] for key in kept if key in image}, "captions": captions[image.get("id")]}
        for image in images
    ]


def _of_msrvtt(path: Path, content: Mapping[str, Any]) -> list[Row]:
    """Return a row for each video, with its sentences; `clip_lists` finds its file."""
    captions: dict[Any, list[str]] = defaultdict(list)
    videos, sentences = content["videos"], content["sentences"]
    try:
        for own in sentences:
            captions[own["video_id"]].append(str(own["caption"]).strip())
        return [
            {
                **{key: video[key] for key in ("video_id", "split", "category") if key in video},
                "captions": captions[video["video_id"]],
            }
            for video in videos
        ]
    except (TypeError, LookupError) as error:
        raise DataError(
            f"{path}: an entry of videos has no video_id, or one of sentences none or no caption"
        ) from error
