"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xray.errors import DataError

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # L2 on the weights, tried on a held-out part of the training


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> dict[str, float]:
    """Top-1 accuracy by L-BFGS on standardised features, [N, D] and [M, D], labels >= 0.

    The L2 strength is the best of STRENGTHS on every fifth training sample, then all are fitted.
    """
    if not ((train_labels >= 0).all() and (test_labels >= 0).all()):
        raise DataError(
            "a linear probe needs a class for every sample: a .cls file or json `label`"
        )
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    train, test = ((x - mean) / deviation for x in (train, test))
    held = torch.arange(len(train)) % 5 == 0
    fitted, labels = train[~held], train_labels[~held]

    def score(strength: float) -> float:
        return _accuracy(_fit(fitted, labels, strength), train[held], train_labels[held])

    strength = max(STRENGTHS, key=score)
    weights = _fit(train, train_labels, strength)
    found = {"top1": _accuracy(weights, test, test_labels), "l2": strength}
    return found | {"samples": float(len(test))}


def _fit(x: Tensor, labels: Tensor, strength: float) -> Tensor:
    """[D + 1, C] weights with the bias last, of least mean cross-entropy + strength/2 * |W|^2."""
    classes = int(labels.max()) + 1
    weights = torch.zeros(x.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights[:-1] + weights[-1], labels)
        loss = loss + strength / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _accuracy(weights: Tensor, x: Tensor, labels: Tensor) -> float:
    return float(((x @ weights[:-1] + weights[-1]).argmax(1) == labels).float().mean())
