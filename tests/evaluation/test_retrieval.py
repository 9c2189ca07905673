"""Retrieval, its chance levels and its intervals against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vectors import unit

from xray.errors import DataError
from xray.evaluation import confidence as bootstrap
from xray.evaluation import retrieval as retrieval_module
from xray.evaluation.retrieval import retrieval


def test_retrieval_equals_brute_force() -> None:
    images, texts = unit(30, 6), unit(80, 6)
    owner = torch.cat([torch.arange(30), torch.arange(30), torch.arange(20)]).sort().values
    result = retrieval(images, texts, owner)
    similarity = images @ texts.t()
    for k in (1, 5, 10):
        to_image = sum(
            owner[j].item() in similarity[:, j].topk(k).indices.tolist() for j in range(80)
        )
        to_text = sum(
            any(owner[j] == i for j in similarity[i].topk(k).indices.tolist()) for i in range(30)
        )
        assert result[f"text_to_image_R@{k}"] == pytest.approx(to_image / 80)
        assert result[f"image_to_text_R@{k}"] == pytest.approx(to_text / 30)


def test_chance_of_retrieval_equals_the_score_of_random_features() -> None:
    torch.manual_seed(0)
    owner = torch.arange(40).repeat_interleave(3)
    runs = [
        retrieval(
            F.normalize(torch.randn(40, 16), dim=-1),
            F.normalize(torch.randn(120, 16), dim=-1),
            owner,
        )
        for _ in range(100)
    ]
    for way in ("text_to_image", "image_to_text"):
        mean = sum(run[f"{way}_R@5"] for run in runs) / len(runs)
        assert mean == pytest.approx(runs[0][f"chance_{way}_R@5"], abs=0.02)


def test_retrieval_with_equal_texts_equals_brute_force() -> None:
    """Clips of a class share their captions, as in action data sets: any of them is correct."""
    images, texts = unit(24, 6), unit(40, 6)
    owner = torch.cat([torch.arange(24), torch.arange(16)])
    kind = torch.arange(40) % 7
    result = retrieval(images, texts, owner, kind=kind)
    of_kind = [{owner[j].item() for j in range(40) if kind[j] == c} for c in range(7)]
    of_image = [{kind[j].item() for j in range(40) if owner[j] == i} for i in range(24)]
    similarity = (images @ texts.t()).tolist()
    to_image, to_text = [], []
    for j in range(40):
        order = sorted(range(24), key=lambda i: -similarity[i][j])
        to_image.append(next(n for n, i in enumerate(order) if i in of_kind[kind[j]]))
    for i in range(24):
        order = sorted(range(40), key=lambda j: -similarity[i][j])
        to_text.append(next(n for n, j in enumerate(order) if kind[j].item() in of_image[i]))
    for k in (1, 5, 10):
        assert result[f"text_to_image_R@{k}"] == pytest.approx(np.mean(np.array(to_image) < k))
        assert result[f"image_to_text_R@{k}"] == pytest.approx(np.mean(np.array(to_text) < k))
    assert result["text_to_image_median_rank"] == np.median(to_image) + 1
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(24)[: len(of_kind[kind[j]])].min() for j in range(40)
                for _ in range(500)]  # fmt: skip
    chance = result["chance_text_to_image_R@5"]
    assert chance == pytest.approx(np.mean(np.array(shuffled) < 5), abs=0.02)
    assert result["chance_text_to_image_median_rank"] == pytest.approx(
        np.median(shuffled) + 1, abs=0.5
    )


@pytest.mark.parametrize("samples", [10, 11])
def test_chance_of_the_median_rank_with_one_correct_result(samples: int) -> None:
    rows = unit(samples, 4)
    result = retrieval(rows, rows, torch.arange(samples))
    assert result["chance_text_to_image_median_rank"] == (samples + 1) / 2


@pytest.mark.parametrize("samples", [5, 20, 50])
def test_collapsed_features_score_at_chance(samples: int) -> None:
    same = torch.ones(samples, 4) / 2
    for captions in (1, 3):
        owner = torch.arange(samples).repeat_interleave(captions)
        result = retrieval(same, same.repeat_interleave(captions, 0), owner)
        for way in ("text_to_image", "image_to_text"):
            for k in (1, 5, 10):
                guessed = result[f"chance_{way}_R@{k}"]
                assert result[f"{way}_R@{k}"] == pytest.approx(guessed, abs=1e-6)


def test_ties_share_a_hit() -> None:
    rows = unit(50, 6).repeat_interleave(2, 0)  # every image and caption occurs twice
    result = retrieval(rows, rows, torch.arange(100))
    for way in ("text_to_image", "image_to_text"):
        assert result[f"{way}_R@1"] == pytest.approx(0.5) and result[f"{way}_R@5"] == 1
        assert result[f"{way}_median_rank"] == 1.5


def test_every_image_needs_a_caption() -> None:
    same = torch.ones(50, 4) / 2
    with pytest.raises(DataError, match="each with a caption"):
        retrieval(same, same[:49], torch.arange(49))


def test_retrieval_in_chunks_gives_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = unit(30, 6), unit(80, 6)
    owner = torch.cat([torch.arange(30), torch.arange(30), torch.arange(20)])
    whole = retrieval(images, texts, owner)
    monkeypatch.setattr(retrieval_module, "HELD", 7 * 80)  # 7 images, 18 texts at a time
    assert retrieval(images, texts, owner) == whole


def test_median_rank_equals_brute_force() -> None:
    images, texts = unit(31, 4), unit(93, 4)
    owner = torch.arange(93) % 31
    similarity = (images @ texts.t()).numpy()
    to_image = [1 + (similarity[:, j] > similarity[owner[j], j]).sum() for j in range(93)]
    best = [similarity[i, owner.numpy() == i].max() for i in range(31)]
    to_text = [1 + (similarity[i] > best[i]).sum() for i in range(31)]
    measures = retrieval(images, texts, owner)
    assert measures["text_to_image_median_rank"] == np.median(to_image)
    assert measures["image_to_text_median_rank"] == np.median(to_text)
    low, high = (measures[f"text_to_image_median_rank_{end}"] for end in ("low", "high"))
    assert low <= np.median(to_image) <= high and low < high
    generator = np.random.default_rng(0)
    places = [generator.permutation(93)[:3].min() + 1 for _ in range(4000)]
    assert measures["chance_image_to_text_median_rank"] == pytest.approx(np.median(places), abs=1)


def test_an_interval_equals_the_binomial_one_and_covers_the_truth() -> None:
    hits = torch.arange(200) < 60
    _, low, high = bootstrap.share("top1", hits).values()
    draws = np.random.default_rng(1).binomial(200, 0.3, 100_000) / 200
    assert (low, high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.01)
    generator, covered = np.random.default_rng(2), 0
    for _ in range(100):
        hits = torch.from_numpy(generator.random(150) < 0.4)
        _, low, high = bootstrap.share("top1", hits).values()
        covered += low <= 0.4 <= high
    assert 88 <= covered <= 100


def test_captions_of_an_image_are_resampled_together() -> None:
    """Five captions with equal hits carry no more information than one."""
    hits = (torch.arange(100) < 37).float()
    weights = torch.full((100,), 5)
    assert bootstrap.share("R", 5 * hits, weights) == pytest.approx(bootstrap.share("R", hits))
    five = bootstrap.median("M", hits.repeat(5), torch.arange(100).repeat(5))
    assert five == bootstrap.median("M", hits, torch.arange(100))


def test_a_resampled_median_equals_numpy() -> None:
    values, owner = torch.randn(40).double(), torch.arange(40) // 2
    interval = bootstrap.median("M", values, owner)
    medians = [
        np.median(np.repeat(values.numpy(), row[owner.numpy()]))
        for counts in bootstrap.resamples(20)
        for row in counts
    ]
    assert (interval["M_low"], interval["M_high"]) == tuple(np.percentile(medians, [2.5, 97.5]))
