"""The process that decodes clips: it may be killed at any moment, and then only one clip is lost.

Run by `sandbox.ClipDecoder` as `python -m data_pipelines.decode.worker SOCKET INPUT OUTPUT`: an
inherited socket for requests and two inherited memory files, for the clip's bytes and its frames.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from data_pipelines.decode.decoders import open_clip, read_clip
from data_pipelines.shards.bad_sample import BadSample

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests until the other side is gone."""
    socket, source, target = (int(number) for number in sys.argv[1:4])
    _end_with(int(sys.argv[4]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the owner ends it
    serve(Connection(socket), source, target)


def serve(connection: Connection, source: int, target: int) -> None:
    """Answer (size, choice, least) with ("ok", total, fps, shape) or ("bad", cause, detail)."""
    memory = Memory(target)
    connection.send(("ok",))
    while True:
        try:
            size, choice, least = connection.recv()
        except EOFError:
            return
        try:
            data = os.pread(source, size, 0)
            clip = open_clip(data)
            frames = read_clip(clip, data, choice.indices(clip.total, clip.fps), least)
            memory.hold(frames)
            answer: Any = ("ok", clip.total, clip.fps, (len(frames), *frames[0].shape))
            del clip, frames, data  # their memory goes before the next clip's comes
        except BadSample as error:
            answer = ("bad", error.cause, error.detail)
        connection.send(answer)


class Memory:
    """The memory file that frames are handed over in; it grows with the largest clip."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._map: mmap.mmap | None = None

    def hold(self, frames: list[np.ndarray]) -> None:
        """Put frames of one shape behind each other."""
        size = sum(frame.nbytes for frame in frames)
        if self._map is None or len(self._map) < size:
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, size)
            self._map = mmap.mmap(self._file, size)
        target = np.frombuffer(self._map, np.uint8, size).reshape(len(frames), *frames[0].shape)
        for place, frame in zip(target, frames, strict=True):
            np.copyto(place, frame)


def _end_with(parent: int) -> None:
    """Die when the parent does, also in the middle of a decode that never returns."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


if __name__ == "__main__":
    main()
