"""Checkpoints that any number of ranks and any ZeRO stage take up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ALL_TOKENS, train
from two_process import halfway

from xray.artifact import open_artifact
from xray.report import read_metrics

STEPS = ("loss", "grad_norm", "lr")


def assert_same(one: Path, two: Path, exact: bool) -> None:
    mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert len(mine) == len(theirs) == 6
    for a, b in zip(mine, theirs, strict=True):
        for name in STEPS:
            assert a[name] == (b[name] if exact else pytest.approx(b[name], rel=1e-4)), a["step"]
    parts = [open_artifact(folder / "artifact") for folder in (one, two)]
    for part in parts[0].manifest["tensors"]:
        first, second = (artifact.load(part) for artifact in parts)
        assert first.keys() == second.keys()
        for name in first:
            if exact:
                assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs of six steps, by stage and what was asked for; each is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(*asked: str) -> Path:
        if asked not in made:
            made[asked] = tmp_path_factory.mktemp("whole") / "run"
            train(asked[0], demo, made[asked], *asked[1:])
        return made[asked]

    return folder


@pytest.mark.parametrize("stage", ["mae", "clip"])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize("second", [0, 1, 2, 3])
def test_a_run_goes_on_in_any_zero_stage(
    demo: Path, tmp_path: Path, whole: Callable[..., Path], stage: str, first: int, second: int
) -> None:
    begun = whole(stage, ALL_TOKENS, f"zero.stage={first}")
    out = halfway(begun, tmp_path / "run")
    train(stage, demo, out, ALL_TOKENS, f"zero.stage={second}")
    assert_same(begun, out, exact=first == second)
