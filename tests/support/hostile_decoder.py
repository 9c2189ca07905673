"""Decode process in which some clips hang, use all memory, crash or are killed by others.

We have no file that does so to current decoders, so bytes that begin with HANG, BLOAT or CRASH
stand for one. KILLED and a path of PATH bytes before a clip make the first process that reads it
kill itself, as the kernel's memory killer does; it leaves that file. Everything else is the real
decode process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from data_pipelines.decode import decoders, worker
from data_pipelines.decode.sandbox import ClipDecoder, Frames

HANG, BLOAT, CRASH, KILLED = b"HANG", b"BLOAT", b"CRASH", b"KILLED"
PATH = 400
real = decoders.open_clip


def killed_once(mark: Path, data: bytes) -> bytes:
    """Mark a clip whose decode process is killed once; see the module's docstring."""
    return KILLED + str(mark).encode().ljust(PATH) + data


def open_clip(data: bytes) -> decoders.Clip:
    """Open a clip, unless its first bytes are one of the markers."""
    if data.startswith(KILLED):
        mark = Path(data[len(KILLED) :][:PATH].decode().rstrip())
        data = data[len(KILLED) + PATH :]
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if data.startswith(HANG):
        while True:
            time.sleep(10_000)
    if data.startswith(BLOAT):
        memory = []
        while True:
            memory.append(bytearray(b"x" * 20_000_000))
            time.sleep(0.01)
    if data.startswith(CRASH):
        import ctypes

        ctypes.string_at(0)
    return real(data)


class Decoder(ClipDecoder):
    """Clip decoder over this process, with a short time limit for a clip that hangs only."""

    def __init__(self, gigabytes: float) -> None:
        super().__init__(3600, gigabytes, (sys.executable, __file__))

    def decode(self, data: bytes, choice: decoders.FrameChoice, least: int = 0) -> Frames:
        self.seconds = 1 if HANG in data[:1000] else 3600
        return super().decode(data, choice, least)


worker.open_clip = open_clip

if __name__ == "__main__":
    worker.main()
