"""Zero-shot classification: class names in prompt templates against picture features.

The prediction is the class of the largest cosine (CLIP, 2103.00020).
"""

from __future__ import annotations

from torch import Tensor

from xray.errors import DataError


def zero_shot(features: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy and chance; features [N, D], labels [N], weights [C, D]."""
    if not (labels >= 0).all():
        raise DataError("zero-shot needs a class for every sample: a .cls file or json `label`")
    classes = len(weights)
    if int(labels.max()) >= classes:
        raise DataError(f"a label is {int(labels.max())}, but there are {classes} class names")
    top = (features @ weights.t()).topk(min(5, classes), dim=1).indices
    hits = top == labels[:, None]
    return {
        "top1": hits[:, 0].float().mean().item(),
        "top5": hits.any(dim=1).float().mean().item(),
        "chance_top1": 1 / classes,
        "chance_top5": min(5, classes) / classes,
        "samples": float(len(labels)),
        "classes": float(classes),
    }
