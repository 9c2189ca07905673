"""Endings of file names: which of them are pictures and clips, and which of these can be read."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence

from data_pipelines.shards.tar_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

# Pictures and clips that cannot be decoded here: they are listed, so that they are reported.
UNREAD = (
    *("heic", "heif", "hif", "jp2", "j2k", "j2c", "jpf", "jpx", "jxl", "jxr", "svg", "ico"),
    *("tga", "ppm", "pgm", "pbm", "pnm", "pfm", "dib", "apng", "psd", "psb", "xcf", "exr", "hdr"),
    *("dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "srw", "pef"),
    *("wmv", "asf", "flv", "f4v", "3gp", "3g2", "ogv", "mts", "m2ts", "ts", "vob", "m2v", "m1v"),
    *("mxf", "rm", "rmvb", "divx", "dv"),
)
MEDIA = frozenset((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, *UNREAD))
# Other endings of formats that are read -> the ending that they are stored with.
SPELLINGS = {"jpe": "jpg", "jfif": "jpg", "pjpeg": "jpg", "pjp": "jpg", "mpe": "mpg", "qt": "mov"}
SHOWN = 20  # endings that a message lists


def ending_of(name: str) -> str:
    """Return the ending of a file name: lower case, without the dot, in its usual spelling."""
    ending = _ending(name)
    return SPELLINGS.get(ending, ending)


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def by_ending(names: Sequence[str]) -> str:
    """Count file names by their endings, for a message: `3 .md, 1 without ending (e.g. a.md)`."""
    counts = Counter(_ending(name) for name in names).most_common()
    listed = [f"{n:,} {f'.{e}' if e else 'without ending'}" for e, n in counts[:SHOWN]]
    rest = sum(n for _, n in counts[SHOWN:])
    return ", ".join([*listed, *([f"{rest:,} others"] if rest else [])]) + f" (e.g. {names[0]})"


# First bytes of a file, from an offset -> its ending.
STARTS: Iterable[tuple[int, bytes, str]] = (
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG", "png"),
    (0, b"GIF8", "gif"),
    (0, b"BM", "bmp"),
    (0, b"II*\0", "tif"),
    (0, b"MM\0*", "tif"),
    (8, b"WEBP", "webp"),
    (8, b"AVI ", "avi"),
    (4, b"ftypavif", "avif"),
    (4, b"ftyp", "mp4"),
    (0, b"\x1a\x45\xdf\xa3", "mkv"),
)


def ending_of_bytes(start: bytes) -> str:
    """Return the ending of a picture or clip from its first 16 bytes, "" if it is unknown."""
    found = (end for at, mark, end in STARTS if start[at : at + len(mark)] == mark)
    return next(found, "")
