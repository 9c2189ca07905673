"""The cached schedule: a block that is cut trains as the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import ALL_TOKENS, train

from xray.training.metrics import read_metrics

PLAIN = (ALL_TOKENS, "model.drop_path=0.0", "train.samples=48", "train.save_every=0")


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("whole")
    for stage in ("clip", "text"):
        blocks = [] if stage == "clip" else ["data.blocks=[{source: photos, samples: 8}]"]
        tune = ["text.tune=lora", "text.lora_rank=2", "text.lora_dropout=0.0"]
        train(stage, demo, out / stage, *PLAIN, *blocks, *tune)
    return {stage: out / stage for stage in ("clip", "text")}


@pytest.mark.parametrize(
    ("stage", "zero"), [("clip", 0), ("clip", 1), ("clip", 2), ("clip", 3), ("text", 0)]
)
def test_a_cut_block_trains_as_the_whole(
    demo: Path, whole: dict[str, Path], tmp_path: Path, stage: str, zero: int
) -> None:
    blocks = [] if stage == "clip" else ["data.blocks=[{source: photos, samples: 8}]"]
    tune = ["text.tune=lora", "text.lora_rank=2", "text.lora_dropout=0.0"]
    cut = ("train.micro_batch=2", f"zero.stage={zero}")
    train(stage, demo, tmp_path, *PLAIN, *blocks, *tune, *cut)
    mine, theirs = (read_metrics(p / "metrics.jsonl") for p in (tmp_path, whole[stage]))
    assert len(mine) == len(theirs) >= 4
    for a, b in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), (name, a["step"])
