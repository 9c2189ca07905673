"""Losses of contrastive training, of patch reconstruction and of tags; none depends on a stage."""

from xray.losses.contrastive import (
    contrast,
    distillation,
    gather_rows,
    info_nce,
    row_ids,
    sigmoid_loss,
)
from xray.losses.reconstruction import masked_patch_mse

__all__ = [
    "contrast",
    "distillation",
    "gather_rows",
    "info_nce",
    "masked_patch_mse",
    "row_ids",
    "sigmoid_loss",
]
