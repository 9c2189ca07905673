"""A decode process whose decoder meets clips that never end, or take all memory.

No file at hand hangs the decoders of today, so bytes that begin with HANG or BLOAT stand for the
ones that did. All else is the real process.
"""

from __future__ import annotations

import time

from data_pipelines.decode import decoders as decode
from data_pipelines.decode import worker as decode_process

HANG, BLOAT, CRASH = b"HANG", b"BLOAT", b"CRASH"
real = decode.open_clip


def open_clip(data: bytes) -> decode.Clip:
    if data.startswith(HANG):
        while True:
            time.sleep(1000)
    if data.startswith(BLOAT):
        held = []
        while True:
            held.append(bytearray(b"x" * 20_000_000))
            time.sleep(0.01)
    if data.startswith(CRASH):
        import ctypes

        ctypes.string_at(0)
    return real(data)


decode_process.open_clip = open_clip

if __name__ == "__main__":
    decode_process.main()
