"""kNN classification by cosine, votes weighted by exp(similarity / T) (DINO, 2104.14294)."""

from __future__ import annotations

import torch
from torch import Tensor

from xray.errors import DataError
from xray.evaluation.class_labels import accuracy, check_labels
from xray.evaluation.zero_shot import HELD


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Measure top-1 accuracy, with chance (`guess`).

    Features [N, D] and [M, D] are normalised; labels [N] and [M] are at least 0. Raises DataError
    for fewer than k training samples.
    """
    check_labels(train_labels, "kNN")
    check_labels(test_labels, "kNN")
    check_neighbours(k, len(train))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    rows = max(1, HELD // (len(train) + classes))
    predicted = []
    for part in test.split(rows):
        similarity, nearest = (part @ train.t()).topk(k, dim=1)
        votes = torch.zeros(len(part), classes)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest: 1
        votes.scatter_add_(1, train_labels[nearest], weight)
        predicted.append(votes.argmax(dim=1))
    return accuracy(torch.cat(predicted), test_labels, train_labels)


def check_neighbours(k: int, samples: int) -> None:
    """Raise DataError for fewer training samples than neighbours."""
    if k > samples:
        raise DataError(f"kNN with k={k} needs that many samples, there are {samples}: lower k")
