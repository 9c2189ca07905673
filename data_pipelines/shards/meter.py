"""Counters and timers of a loader process, read and reset once per micro-batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

Reading = dict[str, tuple[int, float]]  # name -> (times, seconds)
_reading: Reading = {}


@contextmanager
def metered(name: str) -> Iterator[None]:
    """Count one call of `name` and the seconds the block takes."""
    start = time.perf_counter()
    try:
        yield
    finally:
        count(name, 1, time.perf_counter() - start)


def count(name: str, times: int, seconds: float = 0.0) -> None:
    """Add `times` and `seconds` to the counter `name`."""
    add(_reading, {name: (times, seconds)})


def take() -> Reading:
    """Return the counters of this process and reset them."""
    reading = dict(_reading)
    _reading.clear()
    return reading


def add(total: Reading, more: Reading) -> None:
    """Add the counters in `more` to a running total, in place."""
    for name, (times, seconds) in more.items():
        before = total.get(name, (0, 0.0))
        total[name] = (before[0] + times, before[1] + seconds)
