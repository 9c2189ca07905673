"""Waits of the host for the device: one per step, while the next step's passes run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from tiny import ALL_TOKENS, train

from tools.common.device_waits import SYNCHRONIZE, DeviceWaits
from xray.errors import TrainingError
from xray.training.accumulation import Accumulator
from xray.training.engine import Engine
from xray.training.loop import TrainingLoop
from xray.training.metrics import read_metrics

SILENT = ("train.log_every=0", "train.save_every=0", "train.spikes=warn")


def test_a_step_is_read_while_the_next_one_runs(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def spy(name: str, honest: Any) -> Any:
        def call(self: Any, *args: Any) -> Any:
            order.append(name)
            return honest(self, *args)

        return call

    monkeypatch.setattr(Accumulator, "train", spy("passes", Accumulator.train))
    monkeypatch.setattr(TrainingLoop, "_update", spy("update", TrainingLoop._update))
    monkeypatch.setattr(TrainingLoop, "_finish", spy("read", TrainingLoop._finish))
    train("mae", demo, tmp_path, *SILENT, "train.samples=48")
    first, later = ["passes", "update"], ["passes", "read", "update"]
    assert order == [*first, *later, *later, *later, "read"]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("stage", ["mae", "clip"])
def test_passes_and_update_read_nothing(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, zero: int
) -> None:
    waits = DeviceWaits(torch.device("cpu"))

    def watched(honest: Any) -> Any:
        def call(self: TrainingLoop, *args: Any) -> Any:
            if args[0] == 2:  # ZeRO 3 has recorded its prefetch order
                for read in [read for read in waits.found if read.operation != SYNCHRONIZE]:
                    del waits.found[read]
            with waits:
                return honest(self, *args)

        return call

    for name in ("_run_passes", "_update"):
        monkeypatch.setattr(TrainingLoop, name, watched(getattr(TrainingLoop, name)))
    # Several groups of parameters, and no change of the passes by the schedule.
    same = ("optim.vision.layer_decay=0.7", ALL_TOKENS)
    train(stage, demo, tmp_path, *SILENT, *same, f"zero.stage={zero}", "train.micro_batch=4")
    # In each of the other four steps, ZeRO 3 reads a number that is on the host already.
    assert sum(waits.found.values()) == (4 if zero == 3 else 0), waits.found
    assert not [read for read in waits.found if read.operation == SYNCHRONIZE]
    with DeviceWaits(torch.device("cpu")) as control:
        float(torch.ones(()))
        get_accelerator().synchronize()
    assert [number for _, number in sorted(control.found.items())] == [1, 1]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.parametrize("broken", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_changes_nothing(
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    zero: int,
    optimizer: str,
    broken: str,
) -> None:
    """The third step's loss or gradient is NaN; the bundle has the state after the second one."""
    states: list[dict[str, torch.Tensor]] = []
    now: list[int] = []
    passes, average = Accumulator.train, Engine.update_average

    def poison(self: Accumulator, step: int, *args: Any) -> Any:
        now[:] = [step]
        values = passes(self, step, *args)
        if step == 2 and broken == "loss":
            values["loss"] = values["loss"] * torch.nan
        return values

    def state(engine: Engine) -> dict[str, torch.Tensor]:
        slots = (None, *engine.slots)
        return {f"{s}/{n}": engine.read(n, s).clone() for n in engine.trained for s in slots}

    def record(self: Engine, steps: int) -> None:
        average(self, steps)
        states.append(state(self))

    monkeypatch.setattr(Accumulator, "train", poison)
    monkeypatch.setattr(Engine, "update_average", record)
    if broken != "loss":
        backward = Engine.backward

        def infinite(self: Engine, loss: torch.Tensor) -> None:
            backward(self, loss * (torch.inf if now == [2] else 1.0))

        monkeypatch.setattr(Engine, "backward", infinite)
    written: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        "xray.training.loop.write_bundle",
        lambda run, engine, *_: written.append(state(engine)) or "(a bundle)",  # type: ignore[func-returns-value]
    )
    options = (f"zero.stage={zero}", f"optim.name={optimizer}", "train.ema=0.5")
    message = rf"the {broken} of step 3 is .*: stopped before the weights changed"
    with pytest.raises(TrainingError, match=message):
        train("mae", demo, tmp_path, *SILENT, *options)
    assert len(states) == 2 and len(written) == 1
    assert all(torch.equal(value, written[0][name]) for name, value in states[1].items())
    assert read_metrics(tmp_path / "metrics.jsonl") == []
