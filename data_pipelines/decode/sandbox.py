"""Sandbox for video decoding: a separate process with hard limits on time and memory.

A decoder that hangs in C code while it holds the GIL cannot be interrupted, only killed. Each
loader worker has one decode process, and exchanges bytes and frames with it by shared memory.
"""

from __future__ import annotations

import functools
import mmap
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from data_pipelines.decode.decoders import FrameChoice
from xray import processes
from xray.config import DataConfig
from xray.errors import BadSample, DataError, Killed

COMMAND = (sys.executable, "-m", "data_pipelines.decode.worker")
START_SECONDS = 120.0  # enough to import the decoders on a busy machine
POLL_SECONDS = 0.05  # between two checks of the limits
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Frames:
    """Decoded frames of a clip, [T, H, W, 3] uint8, and the length and frame rate of the clip.

    The pixels are in shared memory, and valid until the next clip is decoded.
    """

    pixels: np.ndarray
    total: int  # frames of the clip
    fps: float


class ClipDecoder:
    """Decode process with limits: seconds per clip, and gigabytes of resident memory."""

    def __init__(self, seconds: float, gigabytes: float, command: tuple[str, ...] = COMMAND):
        self.seconds = seconds
        self.limit = int(gigabytes * 1e9)
        self.command = command
        self._source, self._target = (os.memfd_create(name) for name in ("clip", "frames"))
        self._memory: mmap.mmap | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None

    def decode(self, data: bytes, choice: FrameChoice, least: int = 0) -> Frames:
        """Decode the chosen frames of a clip.

        least: length of the short side that is large enough; frames that need much memory are
        scaled down to it. Raises BadSample for a clip that cannot be decoded, Killed for one that
        twice exceeds the same limit or crashes the process, DataError if the process does not
        start.
        """
        try:
            return self._decode(data, choice, least)
        except Killed as error:
            first = error
        # The clip may be sound: the kernel may have killed the process, or something stopped it.
        try:
            return self._decode(data, choice, least)
        except Killed as second:
            if second.cause == first.cause:
                raise
            raise BadSample(second.cause, f"{second.detail}; before: {first}") from second

    def _decode(self, data: bytes, choice: FrameChoice, least: int) -> Frames:
        """Decode the chosen frames once; raises Killed if the process was or had to be killed."""
        if self._process is None:
            self._start()
        elif self._resident() > self.limit // 2:  # memory leaked over many clips: start afresh
            self._stop()
            self._start()
        os.ftruncate(self._source, len(data))
        os.pwrite(self._source, data, 0)
        total, fps, shape = self._ask(len(data), choice, least)
        size = int(np.prod(shape))
        if self._memory is None or len(self._memory) < size:
            self._memory = mmap.mmap(self._target, size)
        return Frames(np.frombuffer(self._memory, np.uint8, size).reshape(shape), total, fps)

    def close(self) -> None:
        """End the process."""
        self._stop()
        os.close(self._source)
        os.close(self._target)

    def _start(self) -> None:
        for _ in range(2):  # a process that starts may be killed, too
            if self._spawn():
                return
            self._stop()
        raise DataError(
            "the decode process does not start: run this command to see its error: "
            f"{' '.join(self.command)} 0 0 0"
        )

    def _spawn(self) -> bool:
        """Start the process; return whether it is ready for requests."""
        parent_end, child_end = socket.socketpair()
        with child_end:
            numbers = (child_end.fileno(), self._source, self._target)
            self._process = processes.start(
                [*self.command, *map(str, numbers)],
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # FFmpeg writes warnings about many files
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            )
        self._connection = Connection(parent_end.detach())
        try:
            return bool(self._connection.poll(START_SECONDS) and self._connection.recv())
        except (EOFError, ConnectionError):
            return False

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None

    def _ask(self, *request: Any) -> tuple[Any, ...]:
        """Send a request and return its answer; raises BadSample or Killed."""
        deadline = time.monotonic() + self.seconds
        try:
            self._connection.send(request)
            while not self._connection.poll(POLL_SECONDS):
                self._check_limits(deadline)
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._stop()
            raise Killed("video decoder crashed", "its process ended") from error
        if answer[0] == "bad":
            raise BadSample(*answer[1:])
        return answer[1:]

    def _check_limits(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            self._stop()
            raise Killed("video decode timed out", f"data.decode_seconds={self.seconds:g}")
        if self._resident() > self.limit:
            self._stop()
            raise Killed(
                "video decode took too much memory", f"data.decode_gb={self.limit / 1e9:g}"
            )

    def _resident(self) -> int:
        """Return the resident memory of the decode process in bytes."""
        assert self._process is not None
        try:
            with open(f"/proc/{self._process.pid}/statm", encoding="utf-8") as file:
                return int(file.read().split()[1]) * PAGE
        except (OSError, IndexError):
            return 0  # the process has ended; the next poll of its socket raises the error


def clip_decoder(data: DataConfig) -> ClipDecoder:
    """Return the decoder of this process with a config's limits; a forked worker gets a new one."""
    return _decoder(os.getpid(), data.decode_seconds, data.decode_gb)


@functools.lru_cache(maxsize=2)
def _decoder(pid: int, seconds: float, gigabytes: float) -> ClipDecoder:
    return ClipDecoder(seconds, gigabytes)
