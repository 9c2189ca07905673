"""Runs with `debug.overfit_batch`: one batch without augmentation, and the verdict in the log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_runs import PHOTOS, State, assert_names_keys, rows_of
from tiny import QUICK, settings, train
from torch import Tensor

from data_pipelines.shards.source import open_source
from stages.base import Parents, StepOutput
from stages.clip import ClipModule, ClipStage
from xray.errors import TrainingError
from xray.training.accumulation import Accumulator

ONE_BATCH = ("debug.overfit_batch=true", "data.flip=true", "model.keep_rate=1.0")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Tensor]]]:
    """Record the micro-batches of each step."""
    recorded: list[list[dict[str, Tensor]]] = []
    original = Accumulator.train

    def spy(self: Accumulator, step: int, progress: float, cut: Any, loaded: Any) -> Any:
        recorded.append([{k: v.clone() for k, v in item.batch.items()} for item in loaded])
        return original(self, step, progress, cut, loaded)

    monkeypatch.setattr(Accumulator, "train", spy)
    return recorded


def same_batches(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_overfit_batch_repeats_the_same_samples_without_augmentation(
    demo: Path, tmp_path: Path, batches: list[list[dict[str, Tensor]]]
) -> None:
    train("clip", demo, tmp_path / "one", *QUICK, *ONE_BATCH, "train.micro_batch=4")
    assert len(batches) == 4 and [len(b["pixels"]) for b in batches[0]] == [4, 4, 4]
    assert all(same_batches(batches[0], other) for other in batches[1:])
    train("clip", demo, tmp_path / "all", *QUICK, "train.micro_batch=4")
    assert not same_batches(batches[4], batches[5])
    assert not same_batches(batches[0], batches[4])  # the same samples, but cropped at random
    source = open_source("photos", str(demo / "photos"), "image")
    stage = ClipStage(settings("clip", demo, tmp_path))
    stage.prepare({"photos": source}, Parents())
    every = [stage.transform(source.sample(*place, 32, 4), None) for place in source.places()]
    for row in torch.cat([b["pixels"] for b in batches[0][:2]]):
        assert sum(torch.equal(row, sample["pixels"]) for sample in every) == 1


def test_overfit_batch_logs_that_the_batch_was_learned(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = (PHOTOS, *ONE_BATCH, "train.samples=240", "train.save_every=0", "optim.base_lr=0.2")
    with caplog.at_level("INFO", "xray"):
        train("clip", demo, tmp_path, *overrides)
    losses = [row["loss"] for row in rows_of(tmp_path)]
    assert losses[-1] < 0.5 * math.log(8) < 0.75 * losses[0]
    (verdict,) = [r.message for r in caplog.records if "overfit_batch" in r.message]
    assert "after 30 steps on the same 8 samples photos/loss is" in verdict
    assert verdict.endswith("guessing gives 2.079: learned") and "not learned" not in verdict
    assert "nothing is learned" not in caplog.text


def test_overfit_batch_logs_what_to_change_if_nothing_is_learned(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = (
        PHOTOS,
        *ONE_BATCH,
        "train.samples=160",
        "train.save_every=0",
        "optim.base_lr=1e-7",
    )
    with caplog.at_level("INFO", "xray"):
        train("clip", demo, tmp_path, *overrides)
    verdicts = [r.message for r in caplog.records if r.message.startswith("overfit_batch")]
    assert len(verdicts) == 1 and "guessing gives 2.079: not learned" in verdicts[0]
    assert_names_keys(verdicts[0], ["optim.base_lr", "train.samples"])
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    # From the monitor, once in the run.
    assert sum("nothing is learned" in text for text in warned) == 1
    assert sum("only 7 negatives" in text for text in warned) == 1


def test_the_bundle_of_a_nan_loss_names_the_samples_of_the_one_batch(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ClipModule.loss_from_features, []

    def poisoned(self: ClipModule, features: State) -> StepOutput:
        calls.append(1)
        loss, metrics = original(self, features)
        return StepOutput(loss * (float("nan") if len(calls) == 3 else 1), metrics)

    def positions(out: Path, *overrides: str) -> Any:
        calls.clear()
        with pytest.raises(TrainingError, match="the loss of step 3 is nan"):
            train("clip", demo, out, *QUICK, PHOTOS, *overrides)
        facts = json.loads((out / "bundles" / "step_00000002" / "bundle.json").read_text())
        return [sample["position"] for sample in facts["samples"]["photos"]]

    monkeypatch.setattr(ClipModule, "loss_from_features", poisoned)
    one = positions(tmp_path / "one", ONE_BATCH[0])
    every = positions(tmp_path / "every")
    assert len(one) == len(every) == 8
    assert 0 in one and not set(one) & set(every)
