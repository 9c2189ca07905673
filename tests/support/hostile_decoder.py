"""A decode process whose decoder meets clips that never end, or take all memory.

No file at hand hangs the decoders of today, so bytes that begin with HANG or BLOAT stand for the
ones that did. All else is the real process.
"""

from __future__ import annotations

import sys
import time

from data_pipelines.decode import decoders as decode
from data_pipelines.decode import worker as decode_process
from data_pipelines.decode.sandbox import ClipDecoder, Frames

HANG, BLOAT, CRASH = b"HANG", b"BLOAT", b"CRASH"
real = decode.open_clip


def open_clip(data: bytes) -> decode.Clip:
    if data.startswith(HANG):
        while True:
            time.sleep(10_000)
    if data.startswith(BLOAT):
        held = []
        while True:
            held.append(bytearray(b"x" * 20_000_000))
            time.sleep(0.01)
    if data.startswith(CRASH):
        import ctypes

        ctypes.string_at(0)
    return real(data)


class Decoder(ClipDecoder):
    """The real decoder over this process: quick to give up on a clip that hangs, and only on it."""

    def __init__(self, gigabytes: float) -> None:
        super().__init__(3600, gigabytes, (sys.executable, __file__))

    def decode(self, data: bytes, choice: decode.FrameChoice, least: int = 0) -> Frames:
        self.seconds = 1 if data.startswith(HANG) else 3600
        return super().decode(data, choice, least)


decode_process.open_clip = open_clip

if __name__ == "__main__":
    decode_process.main()
