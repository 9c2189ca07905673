"""Losses of reconstructed patches."""

from __future__ import annotations

from torch import Tensor

from xray.losses.precision import full_precision


def masked_patch_mse(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the removed patches only (MAE).

    predictions, targets: [B, n, P]. mask: [B, n], 1 is removed.
    """
    error = (full_precision(predictions) - full_precision(targets)).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()
