"""Order in which ZeRO 3 prefetches parameters, which it records once."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from tiny import QUICK, train

from xray.training.accumulation import Accumulator


def test_the_gradient_cache_keeps_the_recorded_order(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes without a backward pass have a record of their own; without it, each step records."""
    complete: list[list[bool]] = []
    reset, passes = PartitionedParameterCoordinator.reset_step, Accumulator.train

    def note_reset(self: PartitionedParameterCoordinator) -> None:
        complete[-1].append(self.is_complete_trace())
        reset(self)

    def note_step(self: Accumulator, *args: object) -> object:
        complete.append([])
        return passes(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PartitionedParameterCoordinator, "reset_step", note_reset)
    monkeypatch.setattr(Accumulator, "train", note_step)
    train("clip", demo, tmp_path, *QUICK, "zero.stage=3", "train.micro_batch=2")
    assert len(complete) == 4 and all(complete)
    assert not all(complete[0])  # the first step records
    shown = ["".join("-C"[here] for here in step) for step in complete]
    assert "-" not in "".join(shown[2:])
