"""A process pool that runs one function on every shard and yields the results in shard order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from xray.errors import DataError
from xray.processes import process_pool

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
    waiting: deque[Future[T]] = deque()
    with reporting_killed_workers(), process_pool(min(workers, count), _start, (work,)) as pool:
        for shard in range(count):
            waiting.append(pool.submit(_call, shard))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


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


def _start(work: Callable[[int], Any]) -> None:
    global _work
    _work = work


def _call(shard: int) -> Any:
    return _work(shard)


_work: Callable[[int], Any]
