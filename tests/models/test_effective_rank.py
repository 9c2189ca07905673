"""The effective rank of features, and the warning about features of few dimensions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.feature_guard import LEAST, PATIENCE, RANK, FeatureGuard
from xray.config import BlockConfig, DataConfig, RunConfig, SourceConfig, TrainConfig
from xray.models.effective_rank import effective_rank

BLOCKS = [BlockConfig("photos", 64), BlockConfig("clips", 8)]


def guard_of(micro_batch: object = 0) -> FeatureGuard:
    sources = {"photos": SourceConfig("photos"), "clips": SourceConfig("clips", "video")}
    data = DataConfig(sources, BLOCKS)
    return FeatureGuard(RunConfig(data=data, train=TrainConfig(micro_batch=micro_batch)))


@pytest.mark.parametrize("spread", [[1.0] * 6, [9.0, 3.0, 1.0, 0.3, 0.1, 0.0], [1.0] + [0.0] * 5])
def test_it_is_the_participation_ratio_of_the_eigenvalues(spread: list[float]) -> None:
    features = np.random.default_rng(0).normal(size=(200, 6)) * spread + 5.0
    values = np.linalg.eigvalsh(np.cov(features.T))
    expected = values.sum() ** 2 / (values**2).sum()
    assert float(effective_rank(torch.from_numpy(features))) == pytest.approx(expected, rel=1e-6)


def test_equal_features_have_rank_0_and_bf16_is_read_in_fp32() -> None:
    assert float(effective_rank(torch.ones(5, 3))) == 0
    features = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert effective_rank(features) == effective_rank(features.double())


def checked(guard: FeatureGuard, rank: float, progress: float, times: int) -> list[str]:
    values = {f"photos/{RANK}": rank, f"clips/{RANK}": 1.0}  # 8 clips say nothing
    return [warning for _ in range(times) for warning in guard.check(values, progress)]


def test_few_dimensions_give_one_warning_in_the_second_half() -> None:
    guard = guard_of()
    assert not checked(guard, 2.0, 0.4, 20)
    assert not checked(guard, 2.0, 0.6, PATIENCE - 1)
    assert not checked(guard, LEAST + 1, 0.6, 1)  # an interruption
    (warning,) = checked(guard, 2.0, 0.7, 20)
    assert "'photos' have only 2.0 effective dimensions" in warning
    assert "optim.base_lr" in warning and "optim.warmup" in warning
    assert not checked(guard, LEAST + 1, 0.9, 1) and not checked(guard, 2.0, 0.9, 20)


def test_stages_without_the_metric_give_no_warning() -> None:
    assert not guard_of().check({"loss": 1.0}, 0.9)


@pytest.mark.parametrize("micro_batch", [8, [[0.0, 64], [0.5, 8]]])
def test_micro_batches_that_are_too_small_to_tell_give_none(micro_batch: object) -> None:
    assert not checked(guard_of(micro_batch), 2.0, 0.7, 20)
    assert checked(guard_of(32), 2.0, 0.7, 20)
