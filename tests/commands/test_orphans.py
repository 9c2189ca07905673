"""No process that a command has started outlives it, even if it is frozen."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from child_process import RECIPE, ROOT, clean_environment
from torch.utils.data import DataLoader, Dataset

from data_pipelines.stream.workers import LoaderContext, read_batches
from tools.common.process_tree import at_work, descendants, freeze, left_of, wait_until
from xray import processes
from xray.processes import process_pool

SECONDS = 5.0  # within which all must have ended
CLIPS = "data.blocks=[{source: photos, samples: 8}, {source: clips, samples: 4}]"


@pytest.fixture(scope="module")
def many(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 2000 shards of photos, more than the workers finish at once."""
    folder = tmp_path_factory.mktemp("many")
    tars = sorted((demo / "photos").glob("*.tar"))
    for number in range(2000):
        os.link(tars[number % len(tars)], folder / f"{number:05d}.tar")
    return folder


def command(kind: str, demo: Path, many: Path, out: Path) -> list[str]:
    """Return a command of a kind whose children work for a while."""
    xray = [sys.executable, "-m", "xray"]
    training = [RECIPE, f"data.root={demo}", "train.samples=12000", "data.workers=2", CLIPS]
    pooled = {
        "check": ["check", str(many), "--workers", "2"],
        "tags": ["tags", str(many), "--out", str(out / "tags.json"), "--workers", "2"],
        "index": ["index", str(many), "--workers", "2"],
        "pack": ["pack", str(out / "files"), str(out / "packed"), "workers=2", "per_shard=2"],
    }
    if kind in pooled:
        return [*xray, "data", *pooled[kind]]
    if kind == "train":
        return [*xray, "run", *training, "stages=[mae]", f"out={out}"]
    if kind == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        return [*launcher, "-m", "xray", "run", *training, "stages=[mae]", f"out={out}"]
    (out / "ablation.yaml").write_text(f"base: {RECIPE}\narms: {{a: {{}}}}\n")
    return [*xray, "ablate", str(out / "ablation.yaml"), *training[1:], f"out={out / 'out'}"]


# kind -> processes below the command at their most
KINDS = {"check": 2, "tags": 2, "index": 2, "pack": 2, "train": 4, "torchrun": 6, "ablate": 5}


def test_a_pool_ends_although_a_worker_is_frozen() -> None:
    with process_pool(2) as pool:
        first, second = (pool.submit(os.getpid) for _ in range(2))
        workers = [psutil.Process(future.result()) for future in (first, second)]
        freeze(workers)
    assert not left_of(workers, SECONDS)


def test_an_error_in_the_block_ends_a_busy_pool() -> None:
    started = []
    with pytest.raises(ZeroDivisionError), process_pool(1) as pool:
        started.append(psutil.Process(pool.submit(os.getpid).result()))
        pool.submit(time.sleep, 10_000)
        raise ZeroDivisionError
    assert not left_of(started, SECONDS)


class Numbers(Dataset):
    """Dataset of numbers and the process that has read each."""

    def __getitem__(self, number: int) -> tuple[int, int]:
        return number, os.getpid()

    def __len__(self) -> int:
        return 1000


def test_a_loader_ends_although_a_worker_is_frozen() -> None:
    loader = DataLoader(Numbers(), None, num_workers=2, multiprocessing_context=LoaderContext())
    batches = read_batches(loader)
    workers = [psutil.Process(next(batches)[1]) for _ in range(2)]
    freeze(workers[:1])
    batches.close()
    assert not left_of(workers, 0.0)


def test_a_process_outlives_the_thread_that_asked_for_it() -> None:
    """The kernel would end it with the thread that started it."""
    started = []
    thread = threading.Thread(target=lambda: started.append(processes.start(["sleep", "10000"])))
    thread.start()
    thread.join()
    with started[0] as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()


def test_a_command_without_a_parent_does_not_start() -> None:
    """The parent may end before the child has asked for its signal."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    command = [sys.executable, "-c", processes.TIE, str(ended.pid), "echo", "started"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b""


def test_output_and_exit_code_of_a_command() -> None:
    done = processes.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_children_end_with_their_parent(
    kind: str, demo: Path, many: Path, tmp_path: Path
) -> None:
    """All children are frozen, so that the command cannot end by itself; then it is killed."""
    (tmp_path / "files").mkdir()
    picture = ROOT / "docs" / "images" / "kept_tokens.png"
    for number in range(400):
        shutil.copy(picture, tmp_path / "files" / f"{number}.png")
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            command(kind, demo, many, tmp_path),
            env=clean_environment(OMP_NUM_THREADS="1"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    below: list[psutil.Process] = []

    def all_at_work() -> bool:
        assert running.poll() is None, (tmp_path / "log").read_text()
        below[:] = descendants(running.pid)
        return len(below) >= KINDS[kind] and all(map(at_work, below))

    try:
        assert wait_until(all_at_work, 300), [process.cmdline() for process in below]
        freeze(below)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    left = left_of(below, SECONDS)
    assert not left, [process.cmdline() for process in left]
