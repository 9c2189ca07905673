"""Limits on images: the pixels that decoding visits, read from the header, and the CPU time.

The decode process imports this module, so it must not import torch.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import ImageFile

from xray.errors import BadSample, Killed

MAX_PIXELS = 64_000_000  # a larger image is a decompression bomb; refused before decoding
MAX_PASSES = 16  # over MAX_PIXELS; a progressive JPEG has about 10, smaller images may have more
SECONDS = 10.0  # of CPU time in Pillow for one image; 64 million pixels take less than 1
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
# A marker of a JPEG with a length; 0xFF00 and restart markers are part of a scan's data.
MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # one before the first scan
SCAN, END = 0xDA, 0xD9  # start of scan, end of image
SCAN_BYTES = 10  # of the smallest scan


def check_size(image: ImageFile.ImageFile, data: bytes) -> None:
    """Raise BadSample if decoding would visit too many pixels, counted in all its passes."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSample("image too large", f"{width} x {height}")
    if image.format == "TIFF":
        _check_tiles(image)
    elif image.format in ("JPEG", "MPO"):
        most = MAX_PIXELS * MAX_PASSES // max(1, width * height)
        if len(data) > most * SCAN_BYTES and (scans := count_scans(data)) > most:
            raise BadSample("image too large", f"{width} x {height} in {scans} scans")


def _check_tiles(image: ImageFile.ImageFile) -> None:
    """Raise BadSample for a TIFF of tiles that overlap too often or are much too large."""
    width, height = image.size
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    tile = [int(tags.get(tag, 0)) for tag in (TILE_WIDTH, TILE_LENGTH)]
    if tile[0] * tile[1] > MAX_PIXELS:  # libtiff decodes a compressed tile as a whole
        raise BadSample("image too large", f"{width} x {height} in tiles of {tile[0]} x {tile[1]}")
    boxes = [tile.extents or (0, 0, width, height) for tile in image.tile]
    visits = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    if visits > MAX_PIXELS * MAX_PASSES:
        raise BadSample("image too large", f"{width} x {height} in {len(boxes)} tiles")


def count_scans(data: bytes) -> int:
    """Count the scans of a JPEG that libjpeg decodes, without those of thumbnails inside it.

    libjpeg decodes no second scan of a baseline JPEG if the first one has all components.
    """
    position = scans = 0
    baseline, components = False, b""
    while (found := MARKER.search(data, position + 2)) and (kind := data[found.end() - 1]) != END:
        position, body = found.start(), found.end() + 2  # of the segment, of its contents
        if kind in FRAMES:
            baseline, components = kind & 3 < 2, data[body + 5 : body + 6]
        elif kind == SCAN:
            scans += 1
            if baseline and data[body : body + 1] == components:
                break
        position += int.from_bytes(data[body - 2 : body], "big")
    return scans


class _TimeUp(BaseException):
    """End of the time for one image; not an Exception, because Pillow catches some of these."""


@contextmanager
def limited_time() -> Iterator[None]:
    """Raise Killed after SECONDS of CPU time, which a stopped or busy machine does not use up.

    Python handles the signal between two operations of its main thread: this interrupts Pillow's
    loops over the parts of a file. Calls of its C decoders are bounded by `check_size`.
    """
    handler = signal.getsignal(signal.SIGVTALRM)
    main = threading.current_thread() is threading.main_thread()
    if not main or handler not in (signal.SIG_DFL, _time_up):  # others may use this timer
        yield
        return
    if handler != _time_up:
        signal.signal(signal.SIGVTALRM, _time_up)
    outer = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    except _TimeUp as error:
        raise Killed("image decode timed out", f"{SECONDS:g} s of CPU time") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *outer)


def _time_up(*_: Any) -> None:
    raise _TimeUp
