"""Long work shows how far it is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int], None]  # told (done, all)
LINE_SECONDS = 15.0  # between lines where there is no terminal to draw a bar on


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """What is told (done, all) of a piece of work shows it on stderr."""
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_of(what: str) -> Callable[[Iterable[Any], int], Iterator[Any]]:
    """A bar over results that come one by one: (results, how many) -> the results."""

    def follow(found: Iterable[Any], total: int) -> Iterator[Any]:
        with progress_bar(what) as tell:
            for number, result in enumerate(found, start=1):
                yield result
                tell(number, total)

    return follow


def _lines(what: str) -> Progress:
    """Lines with an estimate; none for work that is soon done."""
    began = printed = time.monotonic()
    first: int | None = None  # done when it was first told: a second call goes on where one ended

    def tell(done: int, total: int) -> None:
        nonlocal printed, first
        now = time.monotonic()
        first = done if first is None else first
        if now - printed < LINE_SECONDS or done == first:
            return
        printed = now
        left = (total - done) * (now - began) / (done - first)
        print(f"{what}  {done:,}/{total:,}  eta {left:.0f} s", file=sys.stderr, flush=True)

    return tell
