"""Errors of steps that do not fit into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import train

from xray.errors import TrainingError
from xray.training.accumulation import Accumulator
from xray.training.engine import Engine


@pytest.mark.parametrize("place", [(Accumulator, "train"), (Engine, "step")])
def test_the_error_says_what_did_not_fit_and_what_to_set(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str]
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(*place, fail)
    with pytest.raises(TrainingError) as caught:
        train("mae", demo, tmp_path, "train.micro_batch=4", "zero.stage=1")
    for part in (
        "out of memory on cpu in step 1, with micro-batches of 4 samples of 32 px and 4 frames; "
        "set one or more of train.micro_batch=2, model.grad_checkpointing=true, zero.stage=2, "
        "zero.offload=true; `xray plan`",
    ):
        assert part in str(caught.value)
