"""Warnings about failing contrastive training, with the settings to change."""

from __future__ import annotations

import math
from typing import Any

import pytest
from clip_runs import assert_names_keys

from stages.clip_config import ClipOptions
from stages.clip_monitor import ContrastGuard
from xray.config import BlockConfig

HEALTHY = {"loss": 2.0, "mean_cosine": 0.2, "positive_cosine": 0.6, "logit_scale": 20.0}
WRONG: dict[str, tuple[dict[str, float], list[str]]] = {
    "nothing is learned": ({"loss": math.log(128)}, ["debug.overfit_batch", "optim.base_lr"]),
    "are nearly equal": (
        {"mean_cosine": 0.99, "positive_cosine": 0.995}, ["optim.base_lr", "optim.warmup"],
    ),
    "is at clip.logit_scale_max=100": ({"logit_scale": 100.0}, ["optim.logit_scale_lr"]),
    "logit_scale fell from 14.3 to 5.0": (
        {"logit_scale": 5.0}, ["optim.base_lr", "optim.logit_scale_lr", "clip.logit_scale"],
    ),
}  # fmt: skip


def guard_of(*blocks: tuple[str, int], **options: Any) -> ContrastGuard:
    return ContrastGuard([BlockConfig(*block) for block in blocks], ClipOptions(**options))


def logged(source: str = "photos", **changes: float) -> dict[str, float]:
    return {f"{source}/{name}": value for name, value in {**HEALTHY, **changes}.items()}


@pytest.mark.parametrize("what", WRONG)
def test_each_warning_comes_once_after_ten_bad_log_rows(what: str) -> None:
    changes, keys = WRONG[what]
    guard, bad = guard_of(("photos", 128)), logged(**changes)
    for _ in range(30):
        assert guard.check(bad, 0.099) == []
    for _ in range(9):
        assert guard.check(bad, 0.1) == []
    assert guard.check(logged(), 0.2) == []  # an interruption
    for _ in range(9):
        assert guard.check(bad, 0.3) == []
    warnings = guard.check(bad, 0.4)
    assert len(warnings) == 1 and what in warnings[0]
    assert_names_keys(warnings[0], keys)
    for _ in range(12):
        assert guard.check(bad, 0.5) == []
    for _ in range(12):
        assert guard.check(logged(), 0.5) == []
    for _ in range(12):
        assert guard.check(bad, 0.6) == []  # no second warning


def test_healthy_training_gets_no_warning() -> None:
    guard = guard_of(("photos", 128), ("clips", 64))
    for step in range(100):
        edges = logged("clips", mean_cosine=0.97, positive_cosine=0.985, loss=0.97 * math.log(64))
        scales = {"photos/logit_scale": 7.2 + step * 0.92}
        assert guard.check({**logged(), **edges, **scales}, step / 100) == []
    assert guard.check({}, 0.5) == []


def test_warnings_name_their_block_and_do_not_hide_each_other() -> None:
    guard = guard_of(("photos", 128), ("clips", 64))
    alike = logged("clips", mean_cosine=0.99, positive_cosine=0.99)
    for _ in range(9):
        assert guard.check({**logged(), **alike}, 0.5) == []
    (warning,) = guard.check({**logged(), **alike}, 0.5)
    assert "'clips'" in warning and "photos" not in warning
    worse = {**logged(loss=5.0, logit_scale=1.0), **alike}
    for _ in range(9):
        assert guard.check(worse, 0.6) == []
    assert sorted(text[:11] for text in guard.check(worse, 0.6)) == ["logit_scale", "the contras"]


def test_few_negatives_are_reported_at_once_and_only_once() -> None:
    guard = guard_of(("photos", 64), ("clips", 8))
    (warning,) = guard.check({**logged(), **logged("clips", loss=0.1)}, 0.0)
    assert "8 samples of 'clips'" in warning and "only 7 negatives" in warning
    assert_names_keys(warning, ["data.blocks", "train.micro_batch"])
    for progress in (0.0, 0.5):
        assert guard.check({**logged(), **logged("clips", loss=0.1)}, progress) == []
    assert guard_of(("clips", 8), loss="sigmoid").check({}, 0.0) == []
