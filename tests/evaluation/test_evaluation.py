"""Evaluations against brute force."""

from __future__ import annotations

import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from timm.optim import Lars
from vectors import unit

from xray.artifacts.encoders import class_weights
from xray.errors import DataError
from xray.evaluation import confidence as bootstrap
from xray.evaluation.class_labels import accuracy, guess
from xray.evaluation.knn import knn
from xray.evaluation.linear_probe import SOLVERS, STRENGTHS, LinearHead, fit, linear_probe
from xray.evaluation.suites import title_of
from xray.evaluation.zero_shot import zero_shot


@pytest.mark.parametrize("temperature", [0.07, 0.005])  # no float32 holds exp(1 / .005)
def test_knn_equals_brute_force(temperature: float) -> None:
    train, test = unit(60, 5), unit(25, 5)
    labels = torch.arange(60) % 4
    truth = torch.arange(25) % 4
    hits = 0
    for row, label in zip(test, truth, strict=True):
        similarity = train @ row
        votes = [0.0] * 4
        for i in similarity.argsort(descending=True)[:7]:
            votes[labels[i]] += math.exp(similarity[i].item() / temperature)
        hits += votes.index(max(votes)) == label
    assert knn(train, labels, test, truth, 7, temperature)["top1"] == pytest.approx(hits / 25)
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


def test_linear_probe_reaches_nearly_the_bayes_accuracy() -> None:
    torch.manual_seed(0)
    centres = 3 * torch.randn(5, 16)
    labels = torch.arange(200) % 5
    train, test = (centres[labels] + torch.randn(200, 16) for _ in range(2))
    measures = linear_probe(train, labels, test, labels)
    nearest = (torch.cdist(test, centres).argmin(1) == labels).float().mean()  # Bayes, nearly
    assert measures["top1"] >= nearest - 0.03 and measures["l2"] in STRENGTHS
    noise = linear_probe(torch.randn(200, 16), labels, torch.randn(200, 16), labels)
    assert noise["top1"] < 0.35
    with pytest.raises(DataError, match="needs a class for every sample"):
        linear_probe(train, labels - 1, test, labels)


def test_knn_equals_sklearn() -> None:
    train, test = unit(120, 8), unit(50, 8)
    labels, truth = torch.arange(120) % 5, torch.arange(50) % 5
    judge = KNeighborsClassifier(
        20, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute"
    ).fit(train.double().numpy(), labels.numpy())
    assert knn(train, labels, test, truth)["top1"] == judge.score(test.double(), truth)


@pytest.mark.parametrize("strength", [1e-4, 1e-1])
def test_lbfgs_equals_sklearn(strength: float) -> None:
    torch.manual_seed(0)
    labels = torch.arange(150) % 4
    x = torch.randn(150, 10).double() + labels[:, None] * torch.linspace(0, 0.4, 10)
    test = torch.randn(80, 10).double()
    weights = fit(x, labels, strength, torch.randn(11, 4).double())
    head = LinearHead(torch.zeros(10).double(), torch.ones(10).double(), weights)
    judge = LogisticRegression(C=1 / (strength * 150), solver="newton-cg", tol=1e-12)
    judge.fit(x, labels)
    mine = head.logits(test).softmax(dim=1).numpy()
    assert np.abs(mine - judge.predict_proba(test)).max() < 1e-6
    assert (head.predict(test[:, None]).numpy() == judge.predict(test)).all()


def test_linear_probe_equals_sklearn_on_standardised_features() -> None:
    torch.manual_seed(1)
    labels = torch.arange(300) % 6
    train, test = (torch.randn(300, 12) + F.one_hot(labels, 12) for _ in range(2))
    measures = linear_probe(train, labels, test, labels)
    mean, deviation = train.double().mean(0), train.double().std(0)
    judge = LogisticRegression(C=1 / (measures["l2"] * 300), tol=1e-10, max_iter=10_000)
    judge.fit((train - mean) / deviation, labels)
    assert measures["top1"] == judge.score((test - mean) / deviation, labels)


@pytest.mark.parametrize("solver", ["sgd", "mae"])
def test_other_solvers_reach_nearly_the_bayes_accuracy(solver: str) -> None:
    torch.manual_seed(0)
    centres, labels = 3 * torch.randn(5, 16), torch.arange(1500) % 5
    train, test = (7 + centres[labels] + torch.randn(1500, 16) for _ in range(2))
    nearest = (torch.cdist(test, 7 + centres).argmin(1) == labels).float().mean()
    assert linear_probe(train, labels, test, labels, solver)["top1"] >= nearest - 0.04
    head = SOLVERS[solver](train[:, None], labels)
    spread = (train - head.mean) / head.deviation
    assert spread.mean().abs() < 0.01 and abs(spread.std() - 1) < 0.05


def test_lars_equals_the_update_rule_of_mae() -> None:
    """A step without decay: lr * .001 * |w| / |g| along the gradient of a matrix, momentum .9."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    before, gradients = weight.detach().clone(), [torch.randn(4, 3) for _ in range(2)]
    optimizer = Lars([{"params": [weight], "always_adapt": True}], lr=0.5, momentum=0.9)
    velocity, expected = torch.zeros(4, 3), before
    for gradient in gradients:
        velocity = 0.9 * velocity + 0.001 * expected.norm() / gradient.norm() * gradient
        expected = expected - 0.5 * velocity
        weight.grad = gradient
        optimizer.step()
    assert torch.allclose(weight, expected, atol=1e-6)


def test_views_of_a_clip_are_averaged_after_the_softmax() -> None:
    head = LinearHead(torch.zeros(2), torch.ones(2), torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
    # of the logits' mean the second class is the larger, of the softmaxes' the first
    views = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [0.0, 9.0]]])
    assert views.mean(dim=1).argmax() == 1
    assert head.predict(views).item() == 0


def test_mean_per_class_recall_equals_the_balanced_accuracy_of_sklearn() -> None:
    """Also if a class of the training set has no test sample, and one only a single sample."""
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.choice(6, 200, p=[0.5, 0.25, 0.15, 0.07, 0.03, 0]))
    predicted = torch.where(torch.from_numpy(rng.random(200)) < 0.6, truth, 0)
    truth[0], train = 5, torch.arange(60) % 7
    measures = accuracy(predicted, truth, train)
    recall = balanced_accuracy_score(truth, predicted)
    assert measures["mean_per_class_recall"] == pytest.approx(recall, abs=1e-9)
    assert measures["mean_per_class_recall"] != pytest.approx(measures["top1"], abs=0.01)
    assert measures["chance_mean_per_class_recall"] == pytest.approx(1 / 6)
    means = []
    for row in np.concatenate([*bootstrap.resamples(200)]):
        own = np.repeat(np.arange(200), row)
        hits, classes = (predicted == truth)[own].double(), truth[own]
        means.append(np.mean([float(hits[classes == c].mean()) for c in classes.unique()]))
    ends = [measures[f"mean_per_class_recall_{end}"] for end in ("low", "high")]
    assert ends == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-9)
    frequent = accuracy(
        torch.zeros(9).long(), torch.tensor([0] * 7 + [1, 2]), torch.tensor([0, 0, 1, 2])
    )
    assert frequent["top1"] == frequent["chance_top1"] == pytest.approx(7 / 9)
    for key in ("mean_per_class_recall", "chance_mean_per_class_recall"):
        assert frequent[key] == pytest.approx(1 / 3)


def test_recall_of_zero_shot_and_knn_equals_sklearn() -> None:
    features, weights, train = unit(90, 6), unit(4, 6), unit(40, 6)
    labels = torch.cat([torch.zeros(60), torch.arange(30) % 3 + 1]).long()
    measures = zero_shot(features, labels, weights)
    judged = balanced_accuracy_score(labels, (features @ weights.t()).argmax(dim=1))
    assert measures["mean_per_class_recall"] == pytest.approx(judged, abs=1e-9)
    assert measures["chance_mean_per_class_recall"] == 0.25
    own = torch.arange(40) % 4
    judge = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(train, own)
    judged = balanced_accuracy_score(labels, judge.predict(features))
    assert knn(train, own, features, labels, 1)["mean_per_class_recall"] == pytest.approx(judged)


def test_zero_shot_weights_and_accuracy_equal_open_clip() -> None:
    torch.manual_seed(0)
    table = torch.nn.EmbeddingBag(128, 16)

    class Model(torch.nn.Module):
        def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            rows = table(tokens)
            return F.normalize(rows, dim=-1) if normalize else rows

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[ord(c) % 128 for c in text.ljust(24)] for text in texts])

    names, templates = ["cat", "dog", "owl", "newt", "ape", "eel"], ["a {}", "one {} here"]
    calls = [lambda name, t=t: t.format(name) for t in templates]
    with torch.no_grad():
        theirs = open_clip.build_zero_shot_classifier(Model(), tokenize, names, calls)
        mine = class_weights(lambda texts: table(tokenize(list(texts))), names, templates)
    assert torch.allclose(mine, theirs.t(), atol=1e-6)
    features, labels = unit(40, 16), torch.arange(40) % 6
    top = (features @ theirs).topk(5, dim=1).indices
    measures = zero_shot(features, labels, mine)
    assert measures["top1"] == pytest.approx(float((top[:, 0] == labels).double().mean()))
    assert measures["top5"] == pytest.approx(float((top == labels[:, None]).any(1).double().mean()))


def test_one_class_is_refused() -> None:
    features, labels = unit(30, 4), torch.zeros(30, dtype=torch.long)
    with pytest.raises(DataError, match="at least two classes"):
        knn(features, labels, features, labels)
    with pytest.raises(DataError, match="30 of 30 have none"):
        linear_probe(features, labels - 1, features, labels)


def test_chance_is_the_most_frequent_class() -> None:
    train, test = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 0, 1, 2])
    assert guess(train, test) == 0.5
    assert guess(train, torch.tensor([1, 1, 1, 2])) == pytest.approx(1 / 3)  # any class
    assert guess(torch.tensor([0, 1, 2, 3]), test) == 0.25
    rows = unit(5, 3)
    assert knn(rows, train, rows[:4], test, k=1)["chance_top1"] == 0.5


def test_views_of_a_sample_are_held_out_together() -> None:
    """Else the weakest L2 always wins: a held-out view is fitted by its sample's others."""
    torch.manual_seed(0)
    labels = torch.arange(120) % 4
    noisy = torch.randn(120, 1, 40) + 0.7 * F.one_hot(labels, 40)[:, None]
    alone, views = noisy, noisy + 1e-3 * torch.randn(120, 9, 40)
    strengths = [SOLVERS["lbfgs"](rows, labels).strength for rows in (alone, views)]
    assert strengths[0] == strengths[1] > min(STRENGTHS)


def test_titles_name_the_suite() -> None:
    assert title_of("retrieval", "text_to_image_R@5/64") == "text to image R@5, first 64 features"
    assert title_of("video_retrieval", "image_to_text_R@1") == "clip to text R@1"
    assert title_of("finetune", "top1") == "fine-tuning top1"
    assert title_of("hashtag", "photos/loss") == "hashtag photos/loss"
