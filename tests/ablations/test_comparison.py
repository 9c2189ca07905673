"""Tests of the statistics of an ablation: p-values, standard deviations and chance levels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xray.ablations.comparison import chance_of, deviation, paired_t
from xray.evaluation.student_t import mean_interval, student_p


def density(x: np.ndarray, df: int) -> np.ndarray:
    """Return the density of Student's t-distribution."""
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    return scale * (1 + x**2 / df) ** (-(df + 1) / 2)


@pytest.mark.parametrize("df", range(1, 10))
def test_p_equals_the_integral_of_the_density(df: int) -> None:
    for t in (0.1, 0.7, 2.0, 6.0):
        x = np.linspace(0, t, 200_001)
        assert student_p(t, df) == pytest.approx(1 - 2 * np.trapezoid(density(x, df), x), abs=1e-9)
        assert student_p(-t, df) == student_p(t, df)


def test_the_interval_of_a_mean_is_that_of_published_t_tables() -> None:
    for n, t in ((2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (30, 2.045)):
        values = np.random.default_rng(n).normal(0.3, 1.0, n)
        error = values.std(ddof=1) / math.sqrt(n)
        expected = values.mean() - t * error, values.mean() + t * error
        assert mean_interval(values.tolist()) == pytest.approx(expected, abs=5e-4 * error)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)


def test_paired_t() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10):
        values = rng.normal(0.3, 1.0, n).tolist()
        t = np.mean(values) / (np.std(values, ddof=1) / math.sqrt(n))
        assert paired_t(values) == pytest.approx(student_p(float(t), n - 1))
        assert deviation(values) == pytest.approx(np.std(values, ddof=1))
    # critical values of published t-tables
    assert student_p(4.303, 2) == pytest.approx(0.05, abs=1e-4)
    assert student_p(2.776, 4) == pytest.approx(0.05, abs=1e-4)
    assert math.isnan(paired_t([1.0])) and paired_t([0.0, 0.0]) == 1.0
    assert math.isnan(paired_t([0.5, 0.5]))  # equal differences have no variance
    rounded = [a / 40 - (a - 2) / 40 for a in (18, 25, 31)]  # equal up to rounding
    assert deviation(rounded) > 0 and math.isnan(paired_t(rounded))
    assert paired_t([0.05, 0.05 + 1e-6, 0.05 - 1e-6]) < 1e-6


def test_chance_level_of_every_kind_of_metric() -> None:
    available = {
        *("zero_shot.top1", "zero_shot.chance_top1", "zero_shot.chance_top1_low"),
        *("tags.photos/mAP", "tags.photos/recall@5", "tags.photos/chance_recall@5"),
        *("retrieval.text_to_image_R@5", "retrieval.chance_text_to_image_R@5"),
        *("retrieval.text_to_image_R@5/64", "retrieval.text_to_image_R@5_low/64"),
        *("robustness.knn/fgsm/1", "robustness.knn/fgsm/1_low", "robustness.knn/chance"),
        *("robustness.knn/samples", "clip.loss"),
        *("few_shot.logistic_top1@5", "few_shot.logistic_top1@5_low", "few_shot.chance_top1"),
    }
    levels = {name: chance_of(name, available) for name in available}
    assert {name: chance for name, chance in levels.items() if chance} == {
        "zero_shot.top1": "zero_shot.chance_top1",
        "tags.photos/recall@5": "tags.photos/chance_recall@5",
        "retrieval.text_to_image_R@5": "retrieval.chance_text_to_image_R@5",
        "retrieval.text_to_image_R@5/64": "retrieval.chance_text_to_image_R@5",
        "robustness.knn/fgsm/1": "robustness.knn/chance",
        "few_shot.logistic_top1@5": "few_shot.chance_top1",
    }
