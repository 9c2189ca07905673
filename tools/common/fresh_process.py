"""Measurement of peak memory in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def in_fresh_process(work: Callable[..., T], *arguments: object) -> T:
    """Call a module's function in a new process, whose memory contains nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def high_water() -> int:
    """Return the peak resident memory of this process in bytes."""
    # getrusage's ru_maxrss would start at the parent's value
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
