"""Retention of checkpoints, averaged weights, and export of artifacts from checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import ALL_TOKENS, settings, train
from torch import Tensor
from two_process import halfway

from xray.artifacts.artifact import open_artifact
from xray.commands.artifacts import split_run
from xray.config import TrainConfig
from xray.errors import ArtifactError, ConfigError
from xray.training.checkpoint import complete_checkpoints, ranked, step_of
from xray.training.checkpoint_export import export_checkpoint
from xray.training.metrics import read_metrics

VALIDATED = (
    "data.sources.heldout={shards: heldout}",
    "data.validation=[{source: heldout, samples: 8}]",
    "train.validate_every=1",
)
EMA = "train.ema=0.9"


def steps_of(out: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(out / "checkpoints")]


@pytest.fixture(scope="module")
def averaged(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with averaged weights, which keeps all checkpoints."""
    out = tmp_path_factory.mktemp("averaged") / "run"
    train("mae", demo, out, ALL_TOKENS, EMA, "train.save_every=1", "train.keep_every=1")
    return out


def weights_of(run: Path, step: int, which: str, out: Path) -> dict[str, Tensor]:
    artifact = export_checkpoint(run, str(step), out / f"{which}_{step}", which, {})  # type: ignore[arg-type]
    assert artifact.manifest["step"] == step and artifact.manifest["weights"] == which
    return artifact.load("backbone")


def test_newest_periodic_and_best_checkpoints_are_kept(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    keep = ("train.save_every=1", "train.keep_checkpoints=1", "train.keep_every=3")
    best = ("train.keep_best=1", "train.best_by=val/loss", "optim.base_lr=0.3")
    train("mae", demo, out, ALL_TOKENS, *VALIDATED, *keep, *best, "train.best_is=highest")
    losses = [row["val/loss"] for row in read_metrics(out / "metrics.jsonl")]
    worst = 1 + max(range(6), key=losses.__getitem__)
    assert steps_of(out) == sorted({3, 6, worst})
    artifact = export_checkpoint(out, "best", tmp_path / "best", "last", {})
    assert artifact.manifest["step"] == worst
    assert artifact.manifest["metrics"]["val/loss"] == max(losses)


def test_a_missing_best_by_metric_is_reported(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"train\.keep_best.*train\.save_every=3"):
        settings("mae", demo, tmp_path, "train.keep_best=1")
    caplog.set_level("WARNING", logger="xray")
    out = tmp_path / "run"
    train("mae", demo, out, "train.keep_best=2", "train.best_by=photos/los")
    assert "has no metric photos/los (train.best_by)" in caplog.text
    assert steps_of(out) == [3, 6]
    text = (out / "config.yaml").read_text().replace("keep_best: 2", "keep_best: 0")
    (out / "config.yaml").write_text(text)
    with pytest.raises(ArtifactError, match=r"with a measured photos/los: there are 3, 6"):
        export_checkpoint(out, "best", tmp_path / "best", "last", {})


def test_averaged_weights_follow_the_weights_of_each_step(averaged: Path, tmp_path: Path) -> None:
    plain = {step: weights_of(averaged, step, "last", tmp_path) for step in range(1, 7)}
    average = weights_of(averaged, 6, "ema", tmp_path)
    before = weights_of(averaged, 1, "ema", tmp_path)
    name = "blocks.1.attn.qkv.weight"
    expected = before[name].double()
    for step in range(2, 7):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * plain[step][name].double()
    assert torch.allclose(expected, average[name].double(), atol=1e-6)
    assert not torch.equal(average[name], plain[6][name])


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_averaged_weights_are_equal_in_every_zero_stage(
    demo: Path, tmp_path: Path, averaged: Path, zero: int
) -> None:
    more = ("train.save_every=1", "train.keep_every=1", "train.export=ema", f"zero.stage={zero}")
    out = halfway(averaged, tmp_path / "run")
    for path in complete_checkpoints(out / "checkpoints"):
        if step_of(path) > 3:
            (path / "COMPLETE").unlink()
    (out / "run.json").unlink()  # the config differs in train.export
    artifact = train("mae", demo, out, ALL_TOKENS, EMA, *more)
    average, expected = artifact.load("backbone"), weights_of(averaged, 6, "ema", tmp_path)
    assert average.keys() == expected.keys() and artifact.manifest["weights"] == "ema"
    for name, value in expected.items():
        assert torch.allclose(average[name], value, atol=1e-5), name


def test_an_export_of_the_last_checkpoint_equals_the_artifact(
    averaged: Path, tmp_path: Path
) -> None:
    done = open_artifact(averaged)
    artifact = export_checkpoint(averaged, "last", tmp_path / "artifact", "last", {})
    for part in ("backbone", "decoder"):
        a, b = done.load(part), artifact.load(part)
        assert (
            all(torch.equal(value, b[name]) for name, value in a.items()) and a.keys() == b.keys()
        )
    same = {"metrics", "config_hash", "data_digest", "tensors", "keep_rate", "samples", "parents"}
    assert all(done.manifest[key] == artifact.manifest[key] for key in same)


@pytest.mark.parametrize("stage", ["hashtag", "text", "clip"])
def test_every_stage_exports(demo: Path, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "run"
    more = () if stage == "hashtag" else ("text.tune=lora", "text.lora_rank=2")
    if stage == "text":
        more += ("data.blocks=[{source: photos, samples: 12}]",)
    done = train(stage, demo, out, EMA, "train.export=ema", *more)
    artifact = export_checkpoint(out, "6", tmp_path / "again", "ema", {})
    assert artifact.manifest["files"].keys() == done.manifest["files"].keys()
    for file, digest in done.manifest["files"].items():
        assert artifact.manifest["files"][file] == digest, file


def test_incomplete_or_unmeasured_checkpoints_are_never_the_best(tmp_path: Path) -> None:
    for name, score in (("1", math.nan), ("2", 2.0), ("3", 1.0), ("4_kept", 0.5), ("5", None)):
        folder = tmp_path / "checkpoints" / f"step_{name}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"score": score}))
        (folder / "COMPLETE").touch()
    there = complete_checkpoints(tmp_path / "checkpoints")
    assert [step_of(path) for path in there] == [1, 2, 3, 5]
    for best_is, expected in (("lowest", [3, 2]), ("highest", [2, 3])):
        assert [step_of(p) for p in ranked(there, TrainConfig(best_is=best_is))] == expected


@pytest.mark.parametrize(
    ("given", "folder", "which"),
    [
        ("runs/mae", "runs/mae", "last"),
        ("runs/mae@400", "runs/mae", "400"),
        ("/home/me@host/mae", "/home/me@host/mae", "last"),
        ("/home/me@host/mae@best", "/home/me@host/mae", "best"),
    ],
)
def test_the_step_follows_the_last_at_sign(given: str, folder: str, which: str) -> None:
    assert split_run(given) == (folder, which)


def test_impossible_exports_raise(averaged: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no checkpoint '7': there are 1, 2, 3, 4, 5, 6"):
        export_checkpoint(averaged, "7", tmp_path / "a", "last", {})
    with pytest.raises(ArtifactError, match="contains no run"):
        export_checkpoint(tmp_path, "last", tmp_path / "a", "last", {})
    with pytest.raises(ArtifactError, match="already exists"):
        export_checkpoint(averaged, "last", averaged, "last", {})
    with pytest.raises(ConfigError, match=r"train\.export=ema needs averaged weights"):
        settings("mae", averaged, tmp_path, "train.export=ema")
