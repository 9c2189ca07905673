"""Decode process; it may be killed at any time, and then only one clip is lost.

`sandbox.ClipDecoder` runs it as `python -m data_pipelines.decode.worker SOCKET INPUT OUTPUT` with
file descriptors that the process inherits: a socket for requests, a memory file with the bytes of
the clip, and a memory file for its frames.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from data_pipelines.decode.decoders import open_clip, read_clip
from xray.errors import BadSample


def main() -> None:
    """Serve requests until the parent closes the socket."""
    socket, source, target = (int(number) for number in sys.argv[1:4])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent ends this process by SIGKILL
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
            del clip, frames, data  # free the memory before the next clip arrives
        except BadSample as error:
            answer = ("bad", error.cause, error.detail)
        connection.send(answer)


class Memory:
    """Shared memory file for the frames; it grows to the size of the largest clip."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._map: mmap.mmap | None = None

    def hold(self, frames: list[np.ndarray]) -> None:
        """Copy frames of equal shape into the memory, one after the other."""
        size = sum(frame.nbytes for frame in frames)
        if self._map is None or len(self._map) < size:
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, size)
            self._map = mmap.mmap(self._file, size)
        target = np.frombuffer(self._map, np.uint8, size).reshape(len(frames), *frames[0].shape)
        for row, frame in zip(target, frames, strict=True):
            np.copyto(row, frame)


if __name__ == "__main__":
    main()
