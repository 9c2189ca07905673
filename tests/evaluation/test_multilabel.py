"""Mean average precision of samples with several classes, and CLIP_benchmark's own metrics."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shards import photo, write_tar
from sklearn.metrics import average_precision_score, top_k_accuracy_score
from vectors import unit

from data_pipelines.ingest.labelled import open_labelled
from xray.errors import DataError
from xray.evaluation import confidence
from xray.evaluation.multilabel import has_label_vectors, label_vectors, mean_precision
from xray.evaluation.retrieval import retrieval
from xray.evaluation.zero_shot import zero_shot


@pytest.mark.parametrize("digits", [6, 1])  # with one digit, many samples have the same score
def test_mean_average_precision_equals_sklearn(digits: int) -> None:
    torch.manual_seed(digits)
    scores = torch.randn(40, 5).double().round(decimals=digits)
    truth = torch.rand(40, 5) < torch.tensor([0.1, 0.3, 0.5, 0.9, 0.0])
    truth[0, :4] = True
    own = mean_precision(scores, truth)
    by_class = [average_precision_score(truth[:, c], scores[:, c]) for c in range(4)]
    assert own["mean_average_precision"] == pytest.approx(np.mean(by_class), abs=1e-6)
    assert own["classes"] == 5 and own["absent_classes"] == 1 and own["samples"] == 40
    assert (
        own["mean_average_precision_low"]
        < own["mean_average_precision"]
        < own["mean_average_precision_high"]
    )


def test_resampled_precision_equals_sklearn_on_the_drawn_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(confidence, "RESAMPLES", 100)
    torch.manual_seed(0)
    scores, truth = torch.randn(12, 1).double(), torch.arange(12)[:, None] % 3 == 0
    drawn = []
    for counts in confidence.resamples(12):
        for row in counts:
            rows = np.repeat(np.arange(12), row)
            if truth[rows].any():
                drawn.append(average_precision_score(truth[rows, 0], scores[rows, 0]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    own = mean_precision(scores, truth)
    assert own["mean_average_precision_low"] == pytest.approx(low, abs=1e-6)
    assert own["mean_average_precision_high"] == pytest.approx(high, abs=1e-6)


def test_chance_is_the_mean_over_all_orders() -> None:
    truth = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0], [0, 0]]).bool()
    orders = [
        [average_precision_score(truth[:, c], list(order)) for c in range(2)]
        for order in itertools.permutations(range(5))
    ]
    own = mean_precision(torch.randn(5, 2), truth)
    assert own["chance_mean_average_precision"] == pytest.approx(np.mean(orders), abs=1e-6)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("label", [{"label": 1}, {"label": 1, "label_name": "dog"}, {}])
def test_samples_with_a_class_have_no_vectors_of_labels(
    tmp_path: Path, label: dict[str, object]
) -> None:
    """Their .npy files are other data, such as embeddings."""
    facts = {"json": json.dumps(label).encode(), "npy": npy(np.zeros(16))}
    files = {"s.jpg": photo(0)} | {f"s.{ending}": data for ending, data in facts.items()}
    write_tar(tmp_path / "0.tar", files)
    assert has_label_vectors(open_labelled("x", str(tmp_path), "image")) == (not label)


def test_damaged_vectors_of_labels_are_one_line(tmp_path: Path) -> None:
    archive, whole = io.BytesIO(), npy(np.zeros(3))
    np.savez(archive, np.zeros(3))
    broken = whole.replace(b"{'descr'", b"('descr'"), archive.getvalue()[:50], b""
    for data in (archive.getvalue(), *broken):
        write_tar(tmp_path / "0.tar", {"s.jpg": photo(0), "s.npy": data})
        source = open_labelled("x", str(tmp_path), "image")
        with pytest.raises(DataError, match=r"^x: sample s has no \.npy of labels"):
            label_vectors(source, 3)


def test_accuracies_equal_sklearn() -> None:
    images, classes, labels = unit(60, 8), unit(7, 8), torch.arange(60) % 7
    own, scores = zero_shot(images, labels, classes), images @ classes.T
    for k in (1, 5):
        theirs = top_k_accuracy_score(labels, scores, k=k)
        assert own[f"top{k}"] == pytest.approx(theirs, abs=1e-6)


def test_measures_equal_those_of_clip_benchmark() -> None:
    """Its own code, on the same features; its accuracy needs an older numpy."""
    reason = "needs pip install --no-deps clip_benchmark"
    judge = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", reason=reason)
    finder = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason=reason)
    images, classes = unit(60, 8), unit(7, 8)
    truth = torch.rand(60, 7) < 0.3
    truth[:7] |= torch.eye(7).bool()
    precision = judge.average_precision_per_class(images @ classes.T, truth)
    own = mean_precision(images @ classes.T, truth)
    assert own["mean_average_precision"] == pytest.approx(precision.mean().item(), abs=1e-6)

    texts, owner = unit(180, 8), torch.arange(60).repeat_interleave(3)
    model = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda x: x)
    batch = [(images, [[texts[3 * i + j] for j in range(3)] for i in range(60)])]
    found = finder.evaluate(model, batch, torch.stack, "cpu", amp=False, recall_k_list=[1, 5, 10])
    own = retrieval(images, texts, owner)
    for k in (1, 5, 10):
        theirs = found[f"image_retrieval_recall@{k}"], found[f"text_retrieval_recall@{k}"]
        mine = own[f"text_to_image_R@{k}"], own[f"image_to_text_R@{k}"]
        assert mine == pytest.approx(theirs, abs=1e-6)
