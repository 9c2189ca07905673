"""Metrics of a tag head against plain loops in float64 and values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.decode.preparation import center_crop, view_boxes
from xray.errors import ConfigError, DataError
from xray.evaluation.tag_metrics import (
    TagMetrics,
    average_precision,
    calibrate,
    measured_tags,
    random_precision,
    top_tags,
)

N, V = 60, 40
COUNTS = torch.tensor([3000 // (i + 1) for i in range(V)])


def samples(levels: int = 0) -> tuple[Tensor, Tensor]:
    """Make probabilities [N, V] and 1 to 4 tags per sample; few levels make many ties."""
    torch.manual_seed(levels)
    probabilities = (2 * torch.randn(N, V)).softmax(dim=1)
    if levels:
        probabilities = (probabilities * levels).round() / levels
    tags = torch.rand(N, V).argsort(dim=1)[:, :4]
    tags[torch.arange(4) > torch.randint(4, (N, 1))] = -1
    return probabilities, tags


def measure(probabilities: Tensor, tags: Tensor, counts: Tensor, **options: Any) -> TagMetrics:
    metrics = TagMetrics(counts, torch.arange(len(counts)), **options)
    metrics.add(probabilities, tags)
    return metrics


def step_area(scores: list[float], positive: list[bool]) -> float:
    """Sum precision x step of recall over the distinct scores, from the highest."""
    area, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        measures = [own for score, own in zip(scores, positive, strict=True) if score >= threshold]
        new = sum(measures) / sum(positive)
        area += (new - recall) * sum(measures) / len(measures)
        recall = new
    return area


@pytest.mark.parametrize("levels", [0, 8])
def test_measures_equal_plain_loops(levels: int) -> None:
    probabilities, tags = samples(levels)
    own = [{tag for tag in row if tag >= 0} for row in tags.tolist()]
    table = probabilities.double().tolist()
    measures = measure(probabilities, tags, COUNTS).results()

    best = [sorted(range(V), key=lambda tag, row=row: (-row[tag], tag)) for row in table]
    for name, order in (("", best), ("chance_", [list(range(V))] * N)):
        first = sum(order[i][0] in own[i] for i in range(N)) / N
        blind = sum(map(len, own)) / N / V if name else 0.0  # a random tag
        assert measures[f"{name}precision@1"] == pytest.approx(max(first, blind))
        for k in (1, 5, 10):
            recall = sum(len(own[i] & set(order[i][:k])) / len(own[i]) for i in range(N)) / N
            assert measures[f"{name}recall@{k}"] == pytest.approx(max(recall, k / V if name else 0))
    assert measures["dead@10"] == V - len({tag for order in best for tag in order[:10]})

    of_all: list[tuple[float, float]] = []
    of_decade: dict[str, list[tuple[float, float]]] = {}
    names = {1: "<10", 2: "10-99", 3: "100-999", 4: "1,000-9,999"}
    for tag in range(V):
        positive = [tag in tags for tags in own]
        if any(positive):
            pair = step_area([row[tag] for row in table], positive), sum(positive) / N
            of_all.append(pair)
            name = names[int(math.log10(COUNTS[tag])) + 1]
            of_decade.setdefault(name, []).append(pair)
    groups = {"": of_all} | {f"[{name}]": pairs for name, pairs in of_decade.items()}
    assert {name for name in measures if name.startswith("mAP_tags")} == {
        f"mAP_tags{group}" for group in groups
    }
    for group, pairs in groups.items():
        assert measures[f"mAP_tags{group}"] == len(pairs)
        assert measures[f"mAP{group}"] == pytest.approx(np.mean([ap for ap, _ in pairs]), abs=1e-12)
        chance = np.mean([chance for _, chance in pairs])
        assert measures[f"chance_mAP{group}"] == pytest.approx(chance, abs=1e-12)


def test_average_precision_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, scores[[0, 2]]) == pytest.approx((1 + 2 / 3) / 2)
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.1])  # two of the three tied scores are positive
    assert average_precision(scores, scores[[1, 3]]) == pytest.approx(2 / 4)
    assert average_precision(scores, scores[[4]]) == pytest.approx(1 / 5)


@pytest.mark.parametrize("levels", [0, 8])
def test_block_size_does_not_change_the_metrics(levels: int) -> None:
    probabilities, tags = samples(levels)
    tags[20:25] = -1
    whole = measure(probabilities, tags, COUNTS)
    for size in (1, 7, 25):
        metrics = TagMetrics(COUNTS, torch.arange(V))
        for start in range(0, N, size):
            block = tags[start : start + size]
            block = block[:, : max(1, int((block >= 0).sum(dim=1).max()))]  # padding differs
            metrics.add(probabilities[start : start + size], block)
        assert metrics.results() == whole.results()
        assert torch.equal(metrics.calibration().accuracy, whole.calibration().accuracy)


def test_constant_scores_are_at_chance() -> None:
    counts = torch.tensor([900, 50, 7, 30, 20])
    tags = torch.tensor([[0, -1], [1, 0], [3, -1], [2, 4]])
    measures = measure(torch.full((4, 5), 0.2), tags, counts, ks=(1, 2)).results()
    assert measures["chance_precision@1"] == 2 / 4  # always tag 0
    assert measures["chance_recall@1"] == (1 + 1 / 2) / 4
    assert measures["chance_recall@2"] == (1 + 1) / 4  # always tags 0 and 1
    assert measures["chance_mAP"] == pytest.approx((2 + 1 + 1 + 1 + 1) / 5 / 4)
    assert measures["chance_mAP[100-999]"] == pytest.approx(2 / 4)
    assert measures["chance_mAP[<10]"] == pytest.approx(1 / 4)
    assert measures["mAP_tags[10-99]"] == 3 and "mAP[1,000-9,999]" not in measures
    for name in ("precision@1", "recall@1", "recall@2", "mAP", "mAP[100-999]", "mAP[<10]"):
        assert measures[name] == measures[f"chance_{name}"], name
    assert (
        measures["dead@2"] == 3
        and measures["dead_share@2"] == 3 / 5
        and measures["least_dead@2"] == 0
    )
    # by training count, where ids are not in its order
    measures = measure(torch.full((4, 5), 0.2), tags, counts.flip(0), ks=(1, 2)).results()
    assert measures["chance_recall@2"] == max((1 + 1 / 2) / 4, 2 / 5)
    # the most frequent tag, 4, is in one sample; a random tag hits more often
    assert measures["chance_precision@1"] == (1 + 2 + 1 + 2) / 4 / 5


def test_perfect_and_worst_scores() -> None:
    _, tags = samples()
    own = (tags[:, :, None] == torch.arange(V)).any(dim=1)  # [N, V]
    owned = own.sum(dim=1)
    best = measure((10.0 * own).softmax(dim=1), tags, COUNTS).results()
    assert best["precision@1"] == 1 and best["mAP"] == 1 and best["recall@5"] == 1
    assert best["recall@1"] == pytest.approx((1 / owned).mean().item())
    # all negatives before the first positive: the i-th of P positives is at rank N - P + i
    low = torch.arange(N)[:, None] / (1000 * N)
    worst = measure(torch.where(own, low, 0.02), tags, COUNTS).results()
    assert worst["precision@1"] == 0 and worst["recall@10"] == 0
    positives = [P for P in own.sum(dim=0).tolist() if P]
    last = [np.mean([i / (N - P + i) for i in range(1, P + 1)]) for P in positives]
    assert worst["mAP"] == pytest.approx(np.mean(last), abs=1e-12)
    assert worst["mAP"] < worst["chance_mAP"]


def test_random_precision_equals_the_score_of_noise() -> None:
    # 2 of 3: the orders ++-, +-+, -++ have AP 1, 5/6 and 7/12
    measures = random_precision(torch.tensor([1, 2, 3]), 3)
    assert measures.tolist() == pytest.approx([11 / 18, (1 + 5 / 6 + 7 / 12) / 3, 1])
    assert random_precision(torch.tensor([1]), 1).item() == 1
    _, tags = samples()
    runs = [measure(torch.rand(N, V), tags, COUNTS).results() for _ in range(60)]
    mean = np.mean([run["mAP"] for run in runs])
    error = np.std([run["mAP"] for run in runs]) / len(runs) ** 0.5
    assert abs(mean - runs[0]["random_mAP"]) < 4 * error
    assert runs[0]["random_mAP"] > runs[0]["chance_mAP"] + 20 * error


def test_calibration_by_hand() -> None:
    # four bins, each (lower, upper]: 0.25 is in the first
    confidence = torch.tensor([0.1, 0.25, 0.6, 0.7, 0.75, 1.0])
    correct = torch.tensor([False, True, True, False, True, False])
    measures = calibrate(confidence, correct, bins=4)
    assert measures.count.tolist() == [2, 0, 3, 1]
    assert measures.confidence.tolist() == pytest.approx([0.175, 0, 2.05 / 3, 1])
    assert measures.accuracy.tolist() == pytest.approx([0.5, 0, 2 / 3, 0])
    assert measures.error == pytest.approx((2 * 0.325 + 3 * (0.05 / 3) + 1 * 1) / 6)
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.15, 0.8, 0.05]])
    metrics = measure(probabilities, torch.tensor([[0, 2], [2, -1]]), torch.ones(3).long())
    assert metrics.results()["ece"] == pytest.approx((0.3 + 0.8) / 2)
    assert metrics.calibration().count.nonzero().flatten().tolist() == [10, 11]


def test_samples_without_tags_count_for_dead_tags_only() -> None:
    probabilities, tags = samples()
    expected = measure(probabilities, tags, COUNTS).results()
    bare = torch.tensor([[-1, -1, -1, -1]])
    loud = torch.zeros(1, V).index_fill(1, torch.tensor([0]), 1.0)
    measures = measure(torch.cat([loud, probabilities]), torch.cat([bare, tags]), COUNTS).results()
    assert measures == expected | {"untagged": 1.0}
    with pytest.raises(DataError, match="none of the 1 samples has a tag"):
        measure(loud, bare, COUNTS).results()


def test_dead_tags_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04], [0.5, 0.1, 0.3, 0.06, 0.04]])
    tags = torch.tensor([[0], [-1]])
    measures = measure(probabilities, tags, torch.ones(5).long(), ks=(1, 2)).results()
    assert measures["dead@2"] == 2 and measures["dead_share@2"] == 2 / 5
    assert measures["least_dead@2"] == 1 and measures["vocabulary"] == 5


@pytest.mark.parametrize("k", [1, 5, V])
def test_top_tags_equal_a_stable_sort(k: int) -> None:
    for levels in (0, 8, 1):
        scores = samples(levels)[0]
        expected = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        assert torch.equal(top_tags(scores, k), expected)


def test_average_precision_of_a_subset_is_exact_and_its_mean_unbiased() -> None:
    probabilities, tags = samples()
    present = sorted({tag for tag in tags.flatten().tolist() if tag >= 0})
    assert measured_tags(tags, N).tolist() == present
    of_all = measure(probabilities, tags, COUNTS).results()
    means = []
    for seed in range(80):
        chosen = measured_tags(tags, N, held=12 * N + 5, seed=seed)
        assert chosen.tolist() == sorted(set(chosen.tolist()) & set(present))
        metrics = TagMetrics(COUNTS, chosen)
        metrics.add(probabilities, tags)
        measures = metrics.results()
        assert measures["mAP_tags"] == len(chosen) == 12 and measures["tags"] == len(present)
        assert measures["recall@5"] == of_all["recall@5"]
        if seed < 10:
            alone = [
                step_area(probabilities[:, tag].tolist(), (tags == tag).any(dim=1).tolist())
                for tag in chosen
            ]
            assert measures["mAP"] == pytest.approx(np.mean(alone), abs=1e-12)
        means.append(measures["mAP"])
    error = np.std(means) / len(means) ** 0.5
    assert error > 0 and abs(np.mean(means) - of_all["mAP"]) < 4 * error
    nothing = TagMetrics(COUNTS, measured_tags(tags, N)[:0])
    nothing.add(probabilities, tags)
    rest = {name: value for name, value in of_all.items() if "mAP" not in name}
    assert nothing.results() == rest
    assert torch.equal(measured_tags(tags, N, 12 * N, 3), measured_tags(tags.flip(0), N, 12 * N, 3))


def test_impossible_inputs_are_refused() -> None:
    probabilities, tags = samples()
    broken = probabilities.clone()
    broken[3, 5] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        measure(broken, tags, COUNTS)
    with pytest.raises(DataError, match=rf"tag {V}, but the head tells {V} tags"):
        measure(probabilities, torch.full((N, 1), V), COUNTS)
    with pytest.raises(AssertionError, match="not logits"):
        measure(10 * probabilities, tags, COUNTS)


def test_views_by_hand() -> None:
    assert view_boxes(320, 240, 3) == [(0, 0, 240, 240), (40, 0, 240, 240), (80, 0, 240, 240)]
    assert view_boxes(10, 17, 3) == [(0, 0, 10, 10), (0, 3, 10, 10), (0, 7, 10, 10)]
    assert view_boxes(7, 7, 3) == [(0, 0, 7, 7)] * 3
    for size in ((320, 240), (10, 17), (7, 7)):
        assert view_boxes(*size, 1) == [center_crop(*size)] == [view_boxes(*size, 3)[1]]
    with pytest.raises(ConfigError, match="crops=2"):
        view_boxes(320, 240, 2)
