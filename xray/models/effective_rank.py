"""Effective number of dimensions of features."""

from __future__ import annotations

import torch
from torch import Tensor

LOOKED_AT = 256  # rows, so that the matrix of their products stays small


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Compute the participation ratio of the features' covariance: (sum of eigenvalues)^2 / sum of
    their squares.

    features: [B, D]. It is 1 if all features are on a line, and D if they vary equally in all
    directions; at most B - 1. Returns a scalar, 0 if all features are equal.
    """
    x = features[:LOOKED_AT].detach()
    with torch.autocast(x.device.type, enabled=False):
        x = x.double() if x.device.type == "cpu" else x.float()
        x = x - x.mean(dim=0)
        products = x @ x.t()  # [B, B] has the eigenvalues of the covariance, times B
        ratio = products.trace() ** 2 / products.square().sum().clamp(min=torch.finfo(x.dtype).tiny)
    return ratio.float()
