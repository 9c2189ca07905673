"""Work on many shards by many processes, its results in the shards' order."""

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
AHEAD = 4  # jobs that wait per process: results may be large
Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # (results, how many) -> the results


def over_shards(work: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    """work(0), ..., work(count - 1) in order; with more than one worker, in spawned processes.

    `work` is pickled once per process. Raises what it raises, and DataError for a process that was
    killed.
    """
    if workers <= 1 or count <= 1:
        yield from map(work, range(count))
        return
    context = get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, count), context, _start, (work,))
    waiting: deque[Future[T]] = deque()
    try:
        for shard in range(count):
            with _uninterrupted():
                waiting.append(pool.submit(_call, shard))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, maybe for memory: try again with fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """What is spawned in it ignores Ctrl-C until it has started, and then ends by it in silence."""
    if threading.current_thread() is not threading.main_thread():  # signals are not its to set
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without a traceback each


def _call(shard: int) -> Any:
    return _work(shard)


_work: Callable[[int], Any]
