"""Zero-shot classification: class names in prompt templates against picture features.

The prediction is the class of the largest cosine (CLIP, 2103.00020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from xray.errors import DataError
from xray.evaluation.bootstrap import share

HELD = 2**26  # similarities that are held at a time: 256 MiB


def zero_shot(features: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy and chance; features [N, D], labels [N], weights [C, D]."""
    check_labels(labels, "zero-shot")
    classes = len(weights)
    if int(labels.max()) >= classes:
        raise DataError(f"a label is {int(labels.max())}, but there are {classes} class names")
    rows = max(1, HELD // classes)
    first = min(5, classes)
    top = torch.cat([(part @ weights.t()).topk(first).indices for part in features.split(rows)])
    hits = top == labels[:, None]
    return {
        **share("top1", hits[:, 0]),
        **share("top5", hits.any(dim=1)),
        "chance_top1": 1 / classes,
        "chance_top5": first / classes,
        "samples": float(len(labels)),
        "classes": float(classes),
    }


def check_labels(labels: Tensor, what: str) -> None:
    """Raise DataError for samples without a class, and for a set of a single class."""
    if not (labels >= 0).all():
        missing = int((labels < 0).sum())
        raise DataError(
            f"{what} needs a class for every sample, {missing} of {len(labels)} have none: a .cls "
            "file or json `label`, a folder per class, or a .csv with a column `label`"
        )
    if len(labels.unique()) < 2:
        raise DataError(f"{what} needs samples of two classes or more: all are of one")
