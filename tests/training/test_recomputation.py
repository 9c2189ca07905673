"""Blocks that are recomputed or compiled: the same losses, and settings that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import train

from xray.errors import ConfigError
from xray.training.metrics import read_metrics


def losses(demo: Path, out: Path, stage: str, *more: str) -> list[tuple[float, float]]:
    train(stage, demo, out, *more)
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("stage", "values"), [("mae", {0: "true", 3: "mlp"}), ("clip", {0: "mlp", 3: "true"})]
)
def test_activation_checkpointing_changes_nothing(
    demo: Path, tmp_path: Path, stage: str, values: dict[int, str]
) -> None:
    """A repeated block has the same masks, dropped paths and reduced tokens, in ZeRO 0 and 3."""
    random = "model.drop_path=0.3"
    expected = losses(demo, tmp_path / "plain", stage, random)
    for zero, value in values.items():
        again = (random, f"model.grad_checkpointing={value}", f"zero.stage={zero}")
        for row, (loss, norm) in zip(
            losses(demo, tmp_path / f"{value}{zero}", stage, *again), expected, strict=True
        ):
            assert row == pytest.approx((loss, norm), rel=1e-3)


@pytest.mark.slow  # half a minute of compiling on a quiet machine
def test_compiled_blocks_change_nothing(demo: Path, tmp_path: Path) -> None:
    """A few graphs serve all numbers of tokens, which keep rates, resolutions and clips change."""
    for stage, more in (
        ("mae", ["zero.stage=0"]),
        ("hashtag", ["zero.stage=1", "model.grad_checkpointing=true"]),
        ("text", ["zero.stage=0"]),
        ("clip", ["zero.stage=2", "zero.offload=true", "model.grad_checkpointing=mlp"]),
    ):
        expected = losses(demo, tmp_path / f"{stage}-plain", stage)
        torch._dynamo.utils.counters.clear()
        compiled = losses(demo, tmp_path / stage, stage, "train.compile=true", *more)
        for one, other in zip(compiled, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-3)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in range(1, 17)


def test_compiling_is_refused_if_it_would_fail(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"does not work with zero.stage=3.*zero.stage to 2"):
        train("mae", demo, tmp_path / "run", "train.compile=true", "zero.stage=3")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"train.compile=true needs a C\+\+ compiler"):
        train("mae", demo, tmp_path / "run", "train.compile=true")
