"""Losses: functions of tensors, in fp32 or better. The contrastive gather alone knows of ranks."""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor

from xray import dist


def masked_patch_mse(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the removed patches only (MAE).

    predictions, targets: [B, n, P]. mask: [B, n], 1 is removed.
    """
    error = (_full(predictions) - _full(targets)).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def info_nce(queries: Tensor, keys: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE over the whole global batch, own rows only; mean over the local batch.

    queries, keys: [b, D] normalised, row i belongs to row i. The gather passes gradients: their sum
    over ranks and the engine's mean give the gradient of the global loss, with O(b N) memory.
    """
    labels = torch.arange(len(queries), device=queries.device) + dist.rank() * len(queries)
    with torch.autocast(queries.device.type, enabled=False):  # logits near 100 need fp32
        queries, keys = _full(queries), _full(keys)
        rows = scale * queries @ gather_rows(keys).t()
        columns = scale * keys @ gather_rows(queries).t()
    return (F.cross_entropy(rows, labels) + F.cross_entropy(columns, labels)) / 2


def gather_rows(local: Tensor) -> Tensor:
    """[b, D] -> [world * b, D] in rank order, with gradients to every rank's rows."""
    if dist.world_size() == 1:
        return local
    return torch.cat(dist_nn.all_gather(local), dim=0)


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
