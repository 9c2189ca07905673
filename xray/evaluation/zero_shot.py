"""Zero-shot classification: class names in prompt templates against picture features.

The prediction is the class of the largest cosine (CLIP, 2103.00020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from xray.evaluation.class_labels import check_named
from xray.evaluation.confidence import share

HELD = 2**26  # similarities that are held at a time: 256 MiB


def zero_shot(features: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy and chance; features [N, D], labels [N], weights [C, D]."""
    classes = len(weights)
    check_named(labels, classes, "zero-shot")
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
