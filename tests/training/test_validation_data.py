"""Validation samples: the same in every validation, read by workers that are kept."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from tiny import settings

from stages import stage_class
from xray.errors import DataError
from xray.training.run import Run
from xray.training.step_data import ValidationData, step_shape

CPU = torch.device("cpu")
VALIDATION = (
    "data.sources.val={shards: heldout, modality: image}",
    "data.validation=[{source: val, samples: 8}]",
    "data.resolution=[[0, 16], [0.5, 32]]",
    "data.mean=[0, 0, 0]",
)


def children() -> set[int]:
    """Return the process ids of this process's children that run."""
    return {c.pid for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_differ_between_validations_and_workers_are_kept(
    demo: Path, tmp_path: Path, workers: int
) -> None:
    config = settings("mae", demo, tmp_path, *VALIDATION, f"data.workers={workers}")
    run = Run.open(stage_class("mae"), config)
    run.build()
    shapes = [step_shape(run.stage, config.validation, progress) for progress in (0.1, 0.9)]
    before = children()
    kept = ValidationData(run.stage, config, run.validation_plans, CPU)
    batches, pids = [], []
    for shape in (*shapes, *shapes):
        loaded, failure = kept.read(shape)
        assert failure is None
        batches.append([item.batch["pixels"] for item in loaded])
        pids.append(children() - before)
    assert len(pids[0]) == workers and all(each == pids[0] for each in pids)
    kept.close()
    assert children() <= before
    assert [batch[0].shape[-1] for batch in batches] == [16, 32, 16, 32]
    for shape, first, second in zip(shapes, batches[:2], batches[2:], strict=True):
        fresh = ValidationData(run.stage, config, run.validation_plans, CPU)
        loaded, _ = fresh.read(shape)
        fresh.close()
        for item, one, other in zip(loaded, first, second, strict=True):
            assert torch.equal(item.batch["pixels"], one) and torch.equal(one, other)


def test_a_validation_that_cannot_be_read_returns_the_error(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("mae", demo, tmp_path, *VALIDATION)
    run = Run.open(stage_class("mae"), config)
    run.build()

    def fail(*_: object) -> None:
        raise DataError("the disk is gone")

    monkeypatch.setattr(run.stage, "transform", fail)
    data = ValidationData(run.stage, config, run.validation_plans, CPU)
    loaded, failure = data.read(step_shape(run.stage, config.validation, 0.1))
    assert loaded == [] and str(failure) == "the disk is gone"
