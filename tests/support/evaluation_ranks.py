"""Evaluations of two processes: commands of `xray eval`, the end of a recipe, failures, a wait.

usage: torchrun --nproc_per_node 2 evaluation_ranks.py JOBS, a json file
JOBS has `commands` (arguments of xray.commands.evaluate by name), `recipe` (arguments of
load_recipe), `artifacts` (folders, for the recipe), `sets` (overrides of the failing evaluations
of the last artifact) and `out`, a folder. OUT/NAME.RANK.seen has the samples that a rank encoded
in a command, OUT/NAME.RANK the error that it raised.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from odd_ranks import record_error

from xray import agreement, dist
from xray.artifacts.artifact import open_artifact
from xray.commands.evaluate import evaluate
from xray.commands.main import main as command_line
from xray.errors import BadSample
from xray.evaluation import feature_extraction
from xray.evaluation.linear_probe import SOLVERS
from xray.models.backbone import VisionBackbone
from xray.models.text_tower import TextTower
from xray.recipes.recipe import load_recipe
from xray.recipes.run import evaluate as evaluate_recipe
from xray.training.deepspeed_setup import init_distributed

HOUR = 3600.0
Job = Callable[[], None]


def counting(patch: pytest.MonkeyPatch, seen: dict[str, int]) -> None:
    """Count the images, clips and texts that the models of this rank encode."""
    for model in (VisionBackbone, TextTower):

        def forward(self: Any, *args: Any, of: Any = model, run: Any = model.forward, **more: Any):
            first = args[0] if args else more["input_ids"]
            seen[of.__name__] = seen.get(of.__name__, 0) + len(first)
            return run(self, *args, **more)

        patch.setattr(model, "forward", forward)


def run_commands(jobs: dict[str, Any], out: Path) -> None:
    """Run the commands, then the evaluation at the end of the recipe."""
    for name, arguments in jobs["commands"].items():
        with pytest.MonkeyPatch.context() as patch:
            seen: dict[str, int] = {}
            counting(patch, seen)
            evaluate.__wrapped__(**arguments, out=str(out / f"{name}.json"))
            (out / f"{name}.{dist.rank()}.seen").write_text(json.dumps(seen))
    recipe = load_recipe(*jobs["recipe"])
    table = evaluate_recipe(recipe, [open_artifact(path) for path in jobs["artifacts"]])
    assert (table is not None) == dist.is_main()


def bad_sample(patch: pytest.MonkeyPatch) -> None:
    """Let rank 1 find a sample that it cannot read."""
    if dist.rank() == 1:

        def broken(*args: Any) -> Any:
            raise BadSample("broken picture")

        patch.setattr(feature_extraction, "view_pixels", broken)


def not_finite(patch: pytest.MonkeyPatch) -> None:
    """Let rank 0 refuse a batch of rank 1 while it reads the batches."""
    if dist.rank() == 1:
        original = VisionBackbone.forward

        def nan(*args: Any) -> Any:
            output = original(*args)
            return output._replace(cls=output.cls * torch.nan)

        patch.setattr(VisionBackbone, "forward", nan)


def no_fit(patch: pytest.MonkeyPatch) -> None:
    """Let a suite fail on rank 0 while no task is dealt."""

    def full(*args: Any) -> Any:
        raise OSError("no space left on device")

    patch.setitem(SOLVERS, "lbfgs", full)


def long_fit(patch: pytest.MonkeyPatch, out: Path) -> None:
    """Let rank 0 fit a probe until rank 1 has waited for ten hours of its own clock."""
    fitting, waited = out / "fitting", out / "waited"
    fit, clock = SOLVERS["lbfgs"], SimpleNamespace(now=0.0)

    def slow(*args: Any) -> Any:
        fitting.touch()
        while not waited.exists():
            time.sleep(0.01)
        return fit(*args)

    def sleep(seconds: float) -> None:
        if fitting.exists() and not waited.exists():
            clock.now += HOUR
            if clock.now > 10 * HOUR:
                waited.touch()
        time.sleep(0.001)

    if dist.is_main():
        patch.setitem(SOLVERS, "lbfgs", slow)
    else:
        own = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
        patch.setattr(agreement, "time", own)


def main() -> None:
    """Run all evaluations in one process group, and a command with a mistake at last."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    out = Path(jobs["out"])
    init_distributed(torch.device("cpu"))
    run_commands(jobs, out)
    given = {"artifact": jobs["artifacts"][-1], "overrides": jobs["sets"], "suite": "linear_probe"}
    troubles = {
        "bad_sample": bad_sample,
        "not_finite": not_finite,
        "no_fit": no_fit,
        "long_fit": lambda patch: long_fit(patch, out),
    }
    for name, trouble in troubles.items():
        with pytest.MonkeyPatch.context() as patch:
            trouble(patch)
            command = partial(evaluate.__wrapped__, **given, out=str(out / f"{name}.json"))
            record_error(command, out / f"{name}.{dist.rank()}")
    sys.argv = ["xray", "eval", given["artifact"], *jobs["sets"], "--suite", "knm"]
    with suppress(SystemExit):
        command_line()


if __name__ == "__main__":
    main()
