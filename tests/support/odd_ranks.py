"""Training runs of two processes in which one rank is slow or fails, and one that loses its disk.

usage: torchrun --nproc_per_node 2 odd_ranks.py DEMO OUT
If a rank cannot write, OUT/NAME.RANK contains the error that each rank raised. OUT/completed.RANK
lists the steps after which a slow checkpoint was completed, OUT/found.RANK names the checkpoint
that is used after the last one was damaged.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGUSR1
from typing import Any

import pytest
from tiny import ALL_TOKENS, train

from stages.mae import MaeStage
from xray import dist
from xray.errors import XrayError
from xray.models.backbone import VisionBackbone
from xray.training import portable_state, step_data
from xray.training.checkpoint import CheckpointWriter, find_checkpoint

OWN, SECONDS = 0.05, 0.4  # of each forward pass on every rank; more, on the slow rank
ONCE = (ALL_TOKENS, "train.samples=48", "train.log_every=4")
TROUBLE = ("folder", "metrics", "checkpoints", "artifact", "signal", "thread")
IN_BACKGROUND = ("train.samples=120", "train.save_every=3", "train.save_in_background=true")


class Clock:
    """Stands for time.perf_counter: moves only by the durations set here."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, original = 0.0, VisionBackbone.forward

        def forward(backbone: VisionBackbone, *args: Any) -> Any:
            self.now += OWN
            return original(backbone, *args)

        patch.setattr(VisionBackbone, "forward", forward)
        patch.setattr(time, "perf_counter", lambda: self.now)


def slow_forward(patch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Make the forward pass slow."""
    original = VisionBackbone.forward

    def slow(self: VisionBackbone, *args: Any) -> Any:
        clock.now += SECONDS
        return original(self, *args)

    patch.setattr(VisionBackbone, "forward", slow)


def slow_data(patch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Make the loading of data slow."""
    original = step_data.iterate_steps

    def slow(*args: Any) -> Iterator[Any]:
        for item in original(*args):
            clock.now += SECONDS
            yield item

    patch.setattr(step_data, "iterate_steps", slow)


def blocked_folder(out: Path, name: str) -> Path:
    """Make the folder of a run in which rank 0 cannot write one of its files."""
    if name == "folder":
        return Path("/sys/run")
    run = out / name
    run.mkdir()
    if name == "metrics":
        (run / "metrics.jsonl").mkdir()
    elif name == "checkpoints":
        (run / "checkpoints").write_text("")
    return run


def fail_in_thread(patch: pytest.MonkeyPatch) -> None:
    """Let the disk of rank 1 be full when its thread writes the checkpoint of step 3."""
    save_tensors = portable_state.save_tensors

    def full(path: Path, tensors: Any) -> None:
        if not dist.is_main() and "step_00000003" in str(path):
            assert threading.current_thread() is not threading.main_thread()
            raise OSError(errno.ENOSPC, "No space left on device")
        save_tensors(path, tensors)

    patch.setattr(portable_state, "save_tensors", full)


def slow_write(demo: Path, out: Path) -> None:
    """Train a run in which rank 1 writes the checkpoint of step 3 after its own step 5."""
    done, steps, completed = threading.Event(), [0], []
    save_tensors, after_step = portable_state.save_tensors, MaeStage.after_step
    complete = CheckpointWriter.complete

    def count(self: MaeStage, *given: Any) -> None:
        after_step(self, *given)
        steps[0] += 1
        if steps[0] == 5:
            done.set()

    def wait(path: Path, tensors: Any) -> None:
        if not dist.is_main() and "step_00000003" in str(path):
            assert done.wait(600), "training waits for the checkpoint"
        save_tensors(path, tensors)

    def record(self: CheckpointWriter, written: Callable[[], object]) -> None:
        complete(self, written)
        completed.append((self.target.name, steps[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaeStage, "after_step", count)
        patch.setattr(portable_state, "save_tensors", wait)
        patch.setattr(portable_state, "FILE_BYTES", 50_000)  # files for both ranks
        patch.setattr(CheckpointWriter, "complete", record)
        train("mae", demo, out / "slow_write", ALL_TOKENS, *IN_BACKGROUND)
    (out / f"completed.{dist.rank()}").write_text(json.dumps(completed))


def find_damaged(checkpoints: Path) -> str:
    """Find the newest whole checkpoint after a bit of the last one's third file has changed."""

    def flip() -> None:
        file = max(checkpoints.iterdir()) / "portable" / "00002.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    dist.on_main(flip)
    found = find_checkpoint(checkpoints)
    return found.name if found is not None else ""


def mirrored(demo: Path, out: Path) -> None:
    """Train a run with a mirror, lose its folder, and train it again from the mirror.

    The first run is moved to `whole`. The mirror then has only the checkpoint of step 3 complete,
    so the second run, `again`, resumes there.
    """
    bucket = out / "bucket"
    settings = (ALL_TOKENS, f"train.mirror=file://{bucket}", "zero.stage=1")
    train("mae", demo, out / "again", *settings)

    def lose() -> None:
        shutil.move(out / "again", out / "whole")
        for name in ("artifact/manifest.json", "checkpoints/step_00000006/COMPLETE"):
            (bucket / "mae" / name).unlink()

    dist.on_main(lose)
    train("mae", demo, out / "again", *settings)


def record_error(work: Callable[[], object], file: Path) -> None:
    """Call a function and write the error that it raises to a file."""
    try:
        work()
    except (XrayError, OSError) as error:
        agreed = getattr(error, "agreed", False)
        file.write_text(f"{agreed} {type(error).__name__} {error}")


def main() -> None:
    """Train the runs with a slow rank, with errors, and with a mirror."""
    demo, out = Path(sys.argv[1]), Path(sys.argv[2])
    for slow, zero in ((slow_forward, 0), (slow_forward, 1), (slow_data, 0)):
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch)
            if not dist.is_main():
                slow(patch, clock)
            train("mae", demo, out / f"{slow.__name__}-{zero}", *ONCE, f"zero.stage={zero}")
    for name in TROUBLE:
        run = dist.broadcast_object(blocked_folder(out, name) if dist.is_main() else None)
        with pytest.MonkeyPatch.context() as patch:
            if name == "artifact":
                patch.setattr(MaeStage, "export_files", lambda _: {"notes.txt": Path("/no/notes")})
            if name == "signal" and not dist.is_main():
                patch.setattr(MaeStage, "after_step", lambda *_: os.kill(os.getpid(), SIGUSR1))
            more = ONCE
            if name == "thread":
                patch.setattr(portable_state, "FILE_BYTES", 50_000)
                fail_in_thread(patch)
                more = (ALL_TOKENS, *IN_BACKGROUND)
            error_file = out / f"{name}.{dist.rank()}"
            record_error(lambda run=run, more=more: train("mae", demo, run, *more), error_file)
    slow_write(demo, out)
    found = find_damaged(out / "slow_write" / "checkpoints")
    (out / f"found.{dist.rank()}").write_text(found)
    mirrored(demo, out)
    dist.leave()


if __name__ == "__main__":
    main()
