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
SCAN, END = 0xDA, 0xD9  # markers: start of scan, end of image


def check_size(image: ImageFile.ImageFile, data: bytes) -> None:
    """Raise BadSample if decoding would visit too many pixels, counted in all its passes."""
    width, height = image.size
    size = f"{width} x {height}"
    if width * height > MAX_PIXELS:
        raise BadSample("image too large", size)
    tags = getattr(image, "tag_v2", {})
    tile = [int(tags.get(tag, 0)) for tag in (TILE_WIDTH, TILE_LENGTH)]
    if tile[0] * tile[1] > MAX_PIXELS:  # of a compressed TIFF, which libtiff decodes whole
        raise BadSample("image too large", f"{size} in tiles of {tile[0]} x {tile[1]}")
    # The tiles of a TIFF may overlap.
    visits = sum((right - left) * (low - top) for _, (left, top, right, low), *_ in image.tile)
    passes = MAX_PIXELS * MAX_PASSES // max(1, visits)
    if not passes:
        raise BadSample("image too large", f"{size} in {len(image.tile)} tiles")
    if image.format in ("JPEG", "MPO"):
        # Counting bytes is fast, but counts those of thumbnails and of appended files, too.
        if data.count(bytes((0xFF, SCAN))) > passes and count_scans(data) > passes:
            raise BadSample("image too large", f"{size} in more than {passes} scans")


def count_scans(data: bytes) -> int:
    """Count the scans of a JPEG, without those of its thumbnail or of an image appended to it."""
    position = scans = 0
    while (found := MARKER.search(data, position + 2)) and data[found.end() - 1] != END:
        scans += data[found.end() - 1] == SCAN
        position = found.start() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


class _TimeUp(BaseException):
    """End of the time for one image; not an Exception, because Pillow catches some of these."""


@contextmanager
def limited_time() -> Iterator[None]:
    """Raise Killed after SECONDS of CPU time, which a stopped or busy machine does not use up.

    Python handles the signal between two operations of its main thread: this interrupts Pillow's
    loops over the parts of a file. Calls of its C decoders are bounded by `check_size`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGVTALRM, _time_up)
    outer = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    except _TimeUp as error:
        raise Killed("image decode timed out", f"{SECONDS:g} s of CPU time") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *outer)
        signal.signal(signal.SIGVTALRM, handler)


def _time_up(*_: Any) -> None:
    raise _TimeUp
