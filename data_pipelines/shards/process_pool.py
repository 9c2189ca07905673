"""A process pool that runs one function on every shard and yields the results in shard order."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from xray.errors import DataError

T = TypeVar("T")
AHEAD = 4  # submitted jobs per process; a limit, because finished results may be large
# (results, total number) -> the same results; shows a progress bar meanwhile
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


def over_shards(
    work: Callable[[int], T], count: int, workers: int, progress: Progress | None = None
) -> Iterable[T]:
    """Yield work(0), ..., work(count - 1) in order.

    With more than one worker, the calls run in spawned processes, and `work` is pickled once per
    process. Raises any error that `work` raises, and DataError if a process was killed.
    """
    results = _results(work, count, workers)
    return progress(results, count) if progress else results


def _results(work: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    if workers <= 1 or count <= 1:
        yield from map(work, range(count))
        return
    context = get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, count), context, _start, (work,))
    waiting: deque[Future[T]] = deque()
    try:
        with reporting_killed_workers():
            for shard in range(count):
                with _uninterrupted():
                    waiting.append(pool.submit(_call, shard))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def reporting_killed_workers(killed: type[Exception] = BrokenProcessPool) -> Iterator[None]:
    """Convert the error of a pool whose process was killed to DataError."""
    try:
        yield
    except killed as error:
        raise DataError(
            "a worker process was killed, possibly by the out-of-memory killer: run the same "
            "command again with fewer workers"
        ) from error


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Make processes that are spawned in this block ignore Ctrl-C until `_start` runs in them.

    A process that is interrupted during its imports would print a traceback.
    """
    # Python allows only the main thread to set signal handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start(work: Callable[[int], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end on Ctrl-C without a traceback


def _call(shard: int) -> Any:
    return _work(shard)


_work: Callable[[int], Any]
