"""Losses of patch reconstruction."""

from __future__ import annotations

from torch import Tensor

from xray.losses.precision import full_precision


def masked_patch_mse(predictions: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean squared error of each sample's masked patches (MAE, 2111.06377), [B].

    predictions: [B, k, f * P]. targets: [B, k, P], the target of each of the f predicted frames.
    """
    predicted = full_precision(predictions).unflatten(-1, (-1, targets.shape[-1]))
    return (predicted - full_precision(targets)[:, :, None]).square().mean(dim=(1, 2, 3))
