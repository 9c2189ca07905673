"""kNN classification by cosine, votes weighted by exp(similarity / T) (DINO, 2104.14294)."""

from __future__ import annotations

import torch
from torch import Tensor

from xray.errors import DataError


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Top-1 accuracy and chance; features [N, D] and [M, D] normalised, labels >= 0."""
    if not ((train_labels >= 0).all() and (test_labels >= 0).all()):
        raise DataError("kNN needs a class for every sample: a .cls file or json `label`")
    if k > len(train):
        raise DataError(f"kNN with k={k} needs that many samples, there are {len(train)}: lower k")
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    hits = 0
    for start in range(0, len(test), 1024):
        similarity, nearest = (test[start : start + 1024] @ train.t()).topk(k, dim=1)
        votes = torch.zeros(len(similarity), classes)
        votes.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
        hits += int((votes.argmax(dim=1) == test_labels[start : start + 1024]).sum())
    present = int(torch.unique(train_labels).numel())
    return {"top1": hits / len(test), "chance_top1": 1 / present, "samples": float(len(test))}
