"""Losses of patch reconstruction."""

from __future__ import annotations

from torch import Tensor

from xray.losses.precision import full_precision


def masked_patch_mse(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean squared error over the masked patches only (MAE, 2111.06377).

    predictions, targets: [B, n, P]. mask: [B, n], 1 = masked.
    """
    error = (full_precision(predictions) - full_precision(targets)).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()
