"""The processes that a command has started: which there are, and which outlive it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

TRACKER = "multiprocessing.resource_tracker"  # Python's own process; it ends when it is resumed
LIBRARIES = ("numpy", "torch")  # loaded by a process that works, and not by one that starts


def descendants(pid: int) -> list[psutil.Process]:
    """Return all processes below one, without Python's resource trackers."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in below if TRACKER not in " ".join(_command(process))]


def at_work(process: psutil.Process) -> bool:
    """Return True if a process has begun to work: it has its libraries, and as a fork a thread.

    A fork of its parent, such as a loader worker, has the libraries from its first moment. It
    starts a second thread when it sends its first result.
    """
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text("utf-8")
        forked = process.cmdline() == psutil.Process(process.ppid()).cmdline()
        return any(name in maps for name in LIBRARIES) and (not forked or process.num_threads() > 1)
    except (OSError, psutil.NoSuchProcess):
        return False


def freeze(processes: Iterable[psutil.Process]) -> None:
    """Stop processes with SIGSTOP."""
    for process in processes:
        try:
            process.send_signal(signal.SIGSTOP)
        except psutil.NoSuchProcess:
            continue


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, at most some seconds; returns its last value."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def left_of(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Return the processes that are still there after some seconds, and kill them."""
    watched = list(processes)
    left = lambda: [process for process in watched if _alive(process)]  # noqa: E731
    wait_until(lambda: not left(), seconds)
    remaining = left()
    for process in remaining:
        process.kill()
    return remaining


def _alive(process: psutil.Process) -> bool:
    """Return False for a process that the kernel is ending: it has no memory, so no command."""
    return process.is_running() and bool(_command(process))


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
