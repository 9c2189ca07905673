"""Frame rate of GIF and WebP animations, whose frames have durations of their own.

The decode process imports this module, so it must not import torch.
"""

from __future__ import annotations

from contextlib import suppress

DEFAULT = 100  # ms, of frames without a duration
# GIF: introducers of an image and of an extension, and the label of the one with the duration.
IMAGE, EXTENSION, CONTROL = 0x2C, 0x21, 0xF9


def mean_rate(data: bytes) -> float:
    """Return the mean number of frames per second; of a broken file, that of its whole part."""
    durations: list[int] = []
    with suppress(IndexError):
        (_read_gif if data[:4] == b"GIF8" else _read_webp)(data, durations)
    return 1000 / (sum(durations) / len(durations)) if durations else 1000 / DEFAULT


def _read_gif(data: bytes, durations: list[int]) -> None:
    """Append the duration of each image in ms, without decoding it."""
    position, duration = 13 + _palette(data[10]), DEFAULT
    while (kind := data[position]) in (IMAGE, EXTENSION):
        if kind == IMAGE:
            durations.append(duration)
            position, duration = position + 11 + _palette(data[position + 9]), DEFAULT
        else:
            if data[position + 1] == CONTROL:
                duration = 10 * int.from_bytes(data[position + 4 : position + 6], "little")
                duration = duration or DEFAULT
            position += 2
        while size := data[position]:  # blocks of up to 255 bytes
            position += 1 + size
        position += 1


def _palette(flags: int) -> int:
    """Return the bytes of a colour table, 0 if there is none."""
    return 6 << (flags & 7) if flags & 128 else 0


def _read_webp(data: bytes, durations: list[int]) -> None:
    """Append the duration of each frame in ms."""
    position = 12
    while position < len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"ANMF":
            duration = int.from_bytes(data[position + 20 : position + 23], "little")
            durations.append(duration or DEFAULT)
        position += 8 + size + size % 2
