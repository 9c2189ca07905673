"""Worker processes of DataLoaders: how they start, fail and end."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkContext
from typing import Any

from torch.utils.data import DataLoader

from xray import dist
from xray.errors import DataError
from xray.processes import ForkedProcess

KILLED_SECONDS = 30.0  # to wait for the end of a killed process


class LoaderContext(ForkContext):
    """Context for the workers of a DataLoader; they end with the thread that iterates it."""

    Process = ForkedProcess


def read_batches(loader: DataLoader[Any]) -> Generator[Any]:
    """Yield the batches of a DataLoader, and end its workers; raises DataError if one dies."""
    dist.settle(loader.num_workers)
    with reporting_dead_workers():
        batches = iter(loader)
        try:
            yield from batches
        finally:
            if loader.num_workers:
                end_workers(batches)


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
    """Convert the DataLoader's error about a dead worker to DataError."""
    try:
        yield
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):  # the text of torch's error for a dead worker
            raise
        raise DataError(
            f"a loader process ended{when}: the system killed it for lack of memory, or an image "
            f"crashed its decoder; lower data.workers, or run `xray data check` ({error})"
        ) from error
