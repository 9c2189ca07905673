"""Errors of steps that do not fit into memory."""

from __future__ import annotations

import os
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from tiny import train
from torch.distributed import HashStore

from xray import dist
from xray.errors import TrainingError
from xray.training.accumulation import Accumulator
from xray.training.engine import Engine
from xray.training.watchdog import Watchdog


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


def test_the_other_ranks_end_when_one_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 reports; rank 0, which waits in a collective, is ended by its watchdog."""
    store, ended = HashStore(), SimpleQueue[int]()

    def end(code: int) -> None:
        watchdog.close()
        ended.put(code)

    monkeypatch.setattr(dist, "_store", lambda: store)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    dist.report_failure(TrainingError("all ranks raise it").on_all_ranks())
    assert dist.reported_failure() is None
    dist.report_failure(TrainingError("out of memory"))
    assert dist.reported_failure() is None  # its own
    monkeypatch.setenv("RANK", "0")
    watchdog = Watchdog(tmp_path, patience=5)  # long enough to reach `at`, on a busy machine too
    watchdog.at("forward and backward", 3, factor=1e9)
    assert ended.get(timeout=60) == 1
    assert capsys.readouterr().err == "xray: rank 1 has stopped: TrainingError: out of memory\n"
