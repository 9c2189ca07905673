"""Progress of long work on stderr: a bar on a terminal, otherwise a line every 15 s.

Preparation that several stages share logs its outcome once (`log_once`).
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from xray.words import duration

Progress = Callable[[int, int], None]  # called with (done, total)
log = logging.getLogger("xray")
LINE_SECONDS = 15.0  # between lines if stderr is not a terminal


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Yield a function that shows (done, total) of a task on stderr."""
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_of(what: str) -> Callable[[Iterable[Any], int], Iterator[Any]]:
    """Return a wrapper (results, total) -> results that shows progress while it iterates."""

    def follow(results: Iterable[Any], total: int) -> Iterator[Any]:
        with progress_bar(what) as show:
            for number, result in enumerate(results, start=1):
                yield result
                show(number, total)

    return follow


def _lines(what: str) -> Progress:
    """Return a function that prints lines with an estimate; short work prints none."""
    began = printed = time.monotonic()
    first: int | None = None  # `done` at the first call: resumed work does not begin at 0

    def show(done: int, total: int) -> None:
        nonlocal printed, first
        now = time.monotonic()
        first = done if first is None else first
        if now - printed < LINE_SECONDS or done == first:
            return
        printed = now
        left = (total - done) * (now - began) / (done - first)
        print(f"{what}  {done:,}/{total:,}  eta {duration(left)}", file=sys.stderr, flush=True)

    return show


@functools.cache
def log_once(line: str) -> None:
    """Log a line, unless this process has logged the same one."""
    log.info("%s", line)
