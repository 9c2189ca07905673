"""Evaluations against brute force."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xray.errors import DataError
from xray.evaluation.knn import knn
from xray.evaluation.linear_probe import STRENGTHS, linear_probe
from xray.evaluation.retrieval import retrieval
from xray.evaluation.zero_shot import zero_shot
from xray.restore import class_weights


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))), dim=-1
    )


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


def test_chance_of_retrieval_is_what_random_features_reach() -> None:
    torch.manual_seed(0)
    owner = torch.arange(40).repeat_interleave(3)
    runs = [
        retrieval(
            F.normalize(torch.randn(40, 16), dim=-1),
            F.normalize(torch.randn(120, 16), dim=-1),
            owner,
        )
        for _ in range(150)
    ]
    for way in ("text_to_image", "image_to_text"):
        mean = sum(run[f"{way}_R@5"] for run in runs) / len(runs)
        assert mean == pytest.approx(runs[0][f"chance_{way}_R@5"], abs=0.02)


def test_collapsed_features_score_nothing() -> None:
    same = torch.ones(50, 4) / 2
    result = retrieval(same, same, torch.arange(50))
    assert result["text_to_image_R@10"] == 0 and result["image_to_text_R@10"] == 0
    with pytest.raises(DataError, match="each with a caption"):
        retrieval(same, same[:49], torch.arange(49))


def test_knn_equals_brute_force() -> None:
    train, test = unit(60, 5), unit(25, 5)
    labels = torch.arange(60) % 4
    truth = torch.arange(25) % 4
    hits = 0
    for row, label in zip(test, truth, strict=True):
        similarity = train @ row
        votes = [0.0] * 4
        for i in similarity.argsort(descending=True)[:7]:
            votes[labels[i]] += float((similarity[i] / 0.07).exp())
        hits += votes.index(max(votes)) == label
    assert knn(train, labels, test, truth, k=7)["top1"] == pytest.approx(hits / 25)
    with pytest.raises(DataError, match="k=99"):
        knn(train, labels, test, truth, k=99)


def test_zero_shot_averages_normalised_prompts() -> None:
    prompts = {
        "a cat": [3.0, 0.0],
        "the cat": [0.0, 1.0],
        "a dog": [0.0, -2.0],
        "the dog": [-1.0, 0.0],
    }

    def encode(texts: list[str]) -> torch.Tensor:
        return torch.tensor([prompts[text] for text in texts])

    weights = class_weights(encode, ["cat", "dog"], ["a {}", "the {}"])
    half = 0.5**0.5
    assert torch.allclose(weights, torch.tensor([[half, half], [-half, -half]]))
    result = zero_shot(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), weights)
    assert result["top1"] == 0.5 and result["chance_top1"] == 0.5
    with pytest.raises(DataError, match="a class for every sample"):
        zero_shot(torch.ones(1, 2), torch.tensor([-1]), weights)


def test_linear_probe_separates_what_can_be_separated() -> None:
    torch.manual_seed(0)
    centres = 3 * torch.randn(5, 16)
    labels = torch.arange(200) % 5
    train, test = (centres[labels] + torch.randn(200, 16) for _ in range(2))
    found = linear_probe(train, labels, test, labels)
    nearest = (torch.cdist(test, centres).argmin(1) == labels).float().mean()  # Bayes, nearly
    assert found["top1"] >= nearest - 0.03 and found["l2"] in STRENGTHS
    noise = linear_probe(torch.randn(200, 16), labels, torch.randn(200, 16), labels)
    assert noise["top1"] < 0.35
    with pytest.raises(DataError, match="needs a class for every sample"):
        linear_probe(train, labels - 1, test, labels)
