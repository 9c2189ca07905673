"""The figure of R@10 over the number of captions: where clip alone overtakes another arm."""

from __future__ import annotations

import json
import math

import pytest
from source_code import ROOT

from tools.experiments.scarce_figure import (
    METRICS,
    crossover,
    crossovers,
    half_interval,
    points,
    table,
)


@pytest.mark.parametrize(
    ("arm", "base", "number"),
    [
        ({100: 4.0, 10_000: 4.0}, {100: 2.0, 10_000: 6.0}, 1_000),  # half way in the logarithm
        ({100: 4.0, 10_000: 4.0}, {100: 3.0, 10_000: 7.0}, 10**2.5),  # a quarter of the way
        ({100: 4.0, 1_000: 4.0}, {100: 4.0, 1_000: 5.0}, 100),
        ({100: 4.0, 1_000: 4.0}, {100: 2.0, 1_000: 3.0}, None),
        ({100: 2.0, 1_000: 4.0}, {100: 3.0, 1_000: 3.0}, None),  # the arm overtakes
        ({100: 2.0}, {1_000: 3.0}, None),
    ],
)
def test_crossover(arm: dict[int, float], base: dict[int, float], number: float | None) -> None:
    assert crossover(arm, base) == (number if number is None else pytest.approx(number))


def test_crossovers_of_the_mean_over_seeds() -> None:
    recalls = {"clip_100": (1, 3), "clip_10000": (6, 6), "hashtag_clip_100": (4, 4)}
    recalls["hashtag_clip_10000"] = (3, 5)
    runs = [
        {"arm": arm, "seed": seed, **dict.fromkeys(METRICS, recall / 100)}
        for arm, values in recalls.items()
        for seed, recall in enumerate(values)
    ]
    assert [*crossovers(points({"runs": runs}))] == [
        f"{name}: clip overtakes 'hashtag, clip' at about 1,000 captions"
        for name in METRICS.values()
    ]


def test_a_row_has_the_deviation_over_seeds_and_the_ratio_over_common_seeds() -> None:
    recalls = {"clip_900": (8, 8, 20), "hashtag_clip_900": (10, 14), "all_losses_900": (4, 12, 8)}
    runs = [
        {"arm": arm, "seed": seed, **dict.fromkeys(METRICS, recall / 100), "flops": 4e12}
        for arm, values in recalls.items()
        for seed, recall in enumerate(values)
    ]
    clip, hashtag, losses = table(points({"runs": runs})).splitlines()[2:]
    assert clip == "| 900 | clip | 3 |  | 4 | 12.0 ± 6.9 | 1.00 | 12.0 ± 6.9 | 1.00 |  |  |  |"
    assert hashtag.startswith("| 900 | hashtag, clip | 2 |  | 4 | 12.0 ± 2.8 | 1.50 | 12.0 ± 2.8 |")
    assert losses.startswith("| 900 | clip with all losses | 3 |  | 4 | 8.0 ± 4.0 | 0.67 |")


def test_an_interval_needs_three_seeds() -> None:
    """95 % of Student's t with 2 degrees of freedom are within 4.303 standard errors."""
    assert half_interval([10, 12, 14]) == pytest.approx(4.303 * 2 / 3**0.5, rel=1e-3)
    assert math.isnan(half_interval([10, 12]))


def test_the_page_has_the_table_of_the_published_results() -> None:
    facts = json.loads((ROOT / "docs/results/proof/scarce/ablation.json").read_text("utf-8"))
    assert table(points(facts)) in (ROOT / "docs/proof.md").read_text("utf-8")
