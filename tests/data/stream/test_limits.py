"""A machine without enough shared memory or open files: an error in time, not a hang."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import settings
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.stream import limits
from data_pipelines.stream.limits import check_limits
from data_pipelines.stream.workers import LoaderContext, read_batches
from stages import stage_class
from xray.errors import ConfigError, DataError
from xray.training.run import Run


class Limited(Dataset):
    """Dataset of tensors of 1 MB, whose worker is limited before it loads the third."""

    def __init__(self, limit: Callable[[], None]) -> None:
        self.limit = limit

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> Tensor:
        if number == 2:
            self.limit()
        return torch.full((1 << 18,), float(number))


def no_memory() -> None:
    """Let no file of this process grow, as if /dev/shm were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def no_files() -> None:
    """Let this process open no more files."""
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))
    with contextlib.suppress(OSError):
        while True:
            os.dup(0)


def bus_error() -> None:
    """End as a process does that writes to shared memory which does not exist."""
    os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "limit, advice",
    [
        (no_memory, "/dev/shm is full: lower data.workers"),
        (no_files, r"too many open files(:| \() ?run ulimit -n"),
        (bus_error, r"/dev/shm is full(:|, or .*;?) lower data.workers"),  # torch may tell first
    ],
)
def test_a_batch_lost_in_a_worker_is_an_error(limit: Callable[[], None], advice: str) -> None:
    loader = DataLoader(
        Limited(limit), None, num_workers=1, multiprocessing_context=LoaderContext()
    )
    read = []
    with pytest.raises(DataError, match=advice):
        for batch in read_batches(loader):
            read.append(float(batch[0]))
    assert read == [0.0, 1.0][: len(read)]


@pytest.fixture
def soft_limit() -> Iterator[int]:
    """Set the soft limit of open files to 60 more than are open, and restore it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(map(int, os.listdir("/proc/self/fd"))) + 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_of_open_files_is_raised_if_it_may(soft_limit: int) -> None:
    check_limits(1, 1, 1, [1])
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft_limit
    check_limits(2, 1, soft_limit, [1])
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > soft_limit


def test_too_few_open_files_are_refused(soft_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft_limit, soft_limit))
    with pytest.raises(ConfigError, match=f"but only {soft_limit} are allowed: lower data.workers"):
        check_limits(2, 1, soft_limit, [1])


def test_shared_memory_is_checked_before_training(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest pictures of a schedule count; 224 x 224 x 3 bytes x 8 pictures x 8 parts."""
    sizes = ["data.resolution=[[0.0,32],[0.5,224]]", "data.blocks=[{source: photos, samples: 8}]"]

    def opened(workers: int) -> Run:
        config = settings("mae", demo, tmp_path / "out", *sizes, f"data.workers={workers}")
        return Run.open(stage_class("mae"), config)

    class Usage:
        free = 224 * 224 * 3 * 8 * 8

    monkeypatch.setattr(limits.shutil, "disk_usage", lambda _: Usage)
    opened(2)
    Usage.free -= 1
    with pytest.raises(ConfigError, match=r"data.workers=2 needs 9.6 MB in /dev/shm"):
        opened(2)
    opened(0)
