"""What a loader process has spent its time on; read and reset with each micro-batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

Reading = dict[str, tuple[int, float]]  # name -> (times, seconds)
_reading: Reading = {}


@contextmanager
def metered(name: str) -> Iterator[None]:
    """Count one use of `name` and its seconds."""
    start = time.perf_counter()
    try:
        yield
    finally:
        count(name, 1, time.perf_counter() - start)


def count(name: str, times: int, seconds: float = 0.0) -> None:
    before = _reading.get(name, (0, 0.0))
    _reading[name] = (before[0] + times, before[1] + seconds)


def take() -> Reading:
    """What was counted since the last call in this process."""
    reading = dict(_reading)
    _reading.clear()
    return reading


def add(total: Reading, more: Reading) -> None:
    """Add a reading to a running total."""
    for name, (times, seconds) in more.items():
        before = total.get(name, (0, 0.0))
        total[name] = (before[0] + times, before[1] + seconds)
