"""One picture or clip of a folder or a list, with its captions and metadata."""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.tar_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

Row = dict[str, Any]

CAPTION_COLUMNS = ("caption", "captions", "text", "description", "title")
# Pictures and clips that cannot be decoded here: they are listed, so that they are reported.
UNREAD = ("heic", "heif", "jp2", "jxl", "svg", "wmv", "flv", "3gp", "ogv", "mts")
MEDIA = frozenset((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, *UNREAD))


@dataclass(frozen=True)
class Item:
    """A picture or clip: its path, its name relative to the input, its metadata and sidecars."""

    path: Path
    name: str
    meta: Row = field(default_factory=dict)
    sidecars: tuple[Path, ...] = ()
    listed: bool = True  # False: no row of its folder's metadata file names it
    row: int = 0  # number of its row in a list or a metadata file; 0 = no row

    def stamp(self) -> str:
        """Return a line that changes when the file, its sidecars or its metadata change."""
        states = [_state(path) for path in (self.path, *self.sidecars)]
        return json.dumps([self.name, self.meta, states], default=str)

    def describe(self) -> tuple[list[str], Row]:
        """Read captions and metadata, sidecars included; raises BadSample for broken json."""
        meta, captions = dict(self.meta), []
        for path in self.sidecars:
            text = path.read_text("utf-8-sig", errors="replace")
            if path.suffix == ".txt":
                captions = texts_in(text.splitlines())
            else:
                meta |= _parse_sidecar(path.name, text)
        return captions or captions_in(meta), meta


def ending_of(name: str) -> str:
    """Return the ending of a file name: lower case, without the dot."""
    return posixpath.splitext(name)[1][1:].lower()


def captions_in(meta: Row) -> list[str]:
    """Return the captions of the first caption column that is not empty."""
    return next(filter(None, (texts_in(meta.get(column)) for column in CAPTION_COLUMNS)), [])


def texts_in(value: Any) -> list[str]:
    """Return the texts of a field that holds a text, a list of texts, or anything else."""
    lines = value if isinstance(value, list) else [value]
    return [line.strip() for line in lines if isinstance(line, str) and line.strip()]


def _state(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _parse_sidecar(name: str, text: str) -> Row:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise BadSample("broken json", f"{name}: {error}") from error
    if not isinstance(content, dict):
        raise BadSample("broken json", f"{name} is not a json object")
    return content
