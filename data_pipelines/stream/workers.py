"""Worker processes of DataLoaders: how they start, fail and end."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkContext
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader

from data_pipelines.stream.limits import MORE_FILES, remedy
from xray import dist
from xray.errors import DataError, brief
from xray.processes import ForkedProcess

KILLED_SECONDS = 30.0  # to wait for the end of a killed process


@dataclass(frozen=True)
class LostBatch:
    """Batch that a worker could not send."""

    reason: str


class _Queue(Queue):
    """Queue of a DataLoader in which a batch that cannot be sent becomes a LostBatch.

    A worker's queue would print a traceback and drop it, and this process would wait for it.
    """

    def __init__(self, size: int, context: Any) -> None:
        super().__init__(size, ctx=context)
        self._owner = os.getpid()

    def _on_queue_feeder_error(self, error: Exception, item: Any) -> None:
        if os.getpid() != self._owner and isinstance(item, tuple):
            self.put((item[0], LostBatch(f"a batch cannot be sent by its worker: {remedy(error)}")))
        else:
            super()._on_queue_feeder_error(error, item)  # type: ignore[misc]


class LoaderContext(ForkContext):
    """Context for the workers of a DataLoader; they end with the thread that iterates it."""

    Process = ForkedProcess

    def Queue(self, maxsize: int = 0) -> Queue[Any]:  # noqa: N802
        """Make a queue for tasks or batches."""
        return _Queue(maxsize, self)


def read_batches(loader: DataLoader[Any]) -> Generator[Any]:
    """Yield the batches of a DataLoader, and end its workers; raises DataError if one dies."""
    dist.settle(loader.num_workers)
    with reporting_dead_workers():
        batches = iter(loader)
        try:
            for batch in batches:
                yield received(batch)
        finally:
            if loader.num_workers:
                end_workers(batches)


def received(batch: Any) -> Any:
    """Return a batch of a DataLoader; raises DataError if its worker could not send it."""
    if isinstance(batch, LostBatch):
        raise DataError(batch.reason)
    return batch


def end_workers(batches: Any) -> None:
    """End the workers of a DataLoader's iterator, which would keep this process alive.

    A worker that is frozen, hangs in a decoder, waits for a shard or ignores SIGTERM, which the
    DataLoader would send, is killed.
    """
    # Shut down first: the DataLoader reports a worker that dies earlier as a crash.
    batches._shutdown_workers()
    for worker in batches._workers:
        worker.kill()
        worker.join(KILLED_SECONDS)


@contextmanager
def reporting_dead_workers(when: str = "") -> Iterator[None]:
    """Convert the DataLoader's error about a dead worker or lost batch to DataError."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if (advice := remedy(error)) != " ".join(str(error).split()):
            raise DataError(f"a batch was lost{when}: {advice}") from error
        # A worker that cannot open a file to send a batch closes its connection.
        closed = isinstance(error, EOFError | ConnectionError)
        if not closed and "DataLoader worker" not in str(error):  # the text of torch's error
            raise
        files = f", or it had too many open files ({MORE_FILES})" if closed else ""
        raise DataError(
            f"a loader process ended{when}: the system killed it for lack of memory, /dev/shm is "
            f"full, or an image crashed its decoder{files}; lower data.workers, or run "
            f"`xray data check` ({brief(error)})"
        ) from error
