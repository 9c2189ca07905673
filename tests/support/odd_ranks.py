"""Runs of two processes in one process group in which one of them is slow, or in trouble, and one
whose disk is emptied.

usage: torchrun --nproc_per_node 2 odd_ranks.py DEMO OUT
OUT/NAME.RANK has what each rank ended with where rank 0 can't write.
"""

from __future__ import annotations

import os
import shutil
import sys
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
from xray.training import step_data as feed

OWN, SECONDS = 0.05, 0.4  # of every rank for a forward pass, and of the slow one for more
ONCE = (ALL_TOKENS, "train.samples=48", "train.log_every=4")
TROUBLE = ("folder", "metrics", "checkpoints", "artifact", "signal")


class Clock:
    """Stands for time.perf_counter: moves by what a test says that a rank takes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, honest = 0.0, VisionBackbone.forward

        def forward(backbone: VisionBackbone, *given: Any) -> Any:
            self.now += OWN
            return honest(backbone, *given)

        patch.setattr(VisionBackbone, "forward", forward)
        patch.setattr(time, "perf_counter", lambda: self.now)


def slow_forward(patch: pytest.MonkeyPatch, clock: Clock) -> None:
    honest = VisionBackbone.forward

    def slow(self: VisionBackbone, *given: Any) -> Any:
        clock.now += SECONDS
        return honest(self, *given)

    patch.setattr(VisionBackbone, "forward", slow)


def slow_data(patch: pytest.MonkeyPatch, clock: Clock) -> None:
    honest = feed.iterate_steps

    def slow(*given: Any) -> Iterator[Any]:
        for item in honest(*given):
            clock.now += SECONDS
            yield item

    patch.setattr(feed, "iterate_steps", slow)


def in_the_way(out: Path, name: str) -> Path:
    """A run's folder in which something lies where rank 0 is to write, before it is begun."""
    if name == "folder":
        return Path("/sys/run")
    run = out / name
    run.mkdir()
    if name == "metrics":
        (run / "metrics.jsonl").mkdir()
    elif name == "checkpoints":
        (run / "checkpoints").write_text("")
    return run


def mirrored(demo: Path, out: Path) -> None:
    """A run, `whole`, and what comes of its third step's copies on an empty disk, `again`."""
    bucket = out / "bucket"
    settings = (ALL_TOKENS, f"train.mirror=file://{bucket}", "zero.stage=1")
    train("mae", demo, out / "again", *settings)

    def lose() -> None:
        shutil.move(out / "again", out / "whole")
        for name in ("artifact/manifest.json", "checkpoints/step_00000006/COMPLETE"):
            (bucket / "mae" / name).unlink()

    dist.on_main(lose)
    train("mae", demo, out / "again", *settings)


def end_of(work: Callable[[], object], file: Path) -> None:
    try:
        work()
    except (XrayError, OSError) as error:
        agreed = getattr(error, "agreed", False)
        file.write_text(f"{agreed} {type(error).__name__} {error}")


def main() -> None:
    demo, out = Path(sys.argv[1]), Path(sys.argv[2])
    for slow, zero in ((slow_forward, 0), (slow_forward, 1), (slow_data, 0)):
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch)
            if not dist.is_main():
                slow(patch, clock)
            train("mae", demo, out / f"{slow.__name__}-{zero}", *ONCE, f"zero.stage={zero}")
    for name in TROUBLE:
        run = dist.broadcast_object(in_the_way(out, name) if dist.is_main() else None)
        with pytest.MonkeyPatch.context() as patch:
            if name == "artifact":
                patch.setattr(MaeStage, "export_files", lambda _: {"notes.txt": Path("/no/notes")})
            if name == "signal" and not dist.is_main():
                patch.setattr(MaeStage, "after_step", lambda *_: os.kill(os.getpid(), SIGUSR1))
            end_of(lambda run=run: train("mae", demo, run, *ONCE), out / f"{name}.{dist.rank()}")
    mirrored(demo, out)
    dist.leave()


if __name__ == "__main__":
    main()
