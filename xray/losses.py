"""Losses: functions of tensors, in fp32 or better. The contrastive ones alone know of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xray import dist

# Logits that are held at a time: a contrast of more is gone through in groups of rows.
MOST_LOGITS = 1 << 24


def masked_patch_mse(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the removed patches only (MAE).

    predictions, targets: [B, n, P]. mask: [B, n], 1 is removed.
    """
    error = (_full(predictions) - _full(targets)).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def info_nce(
    queries: Tensor, keys: Tensor, scale: Tensor | float, groups: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE over the whole global batch, own rows only; mean over the local batch.

    queries, keys: [b, D] normalised, row i belongs to row i. groups: [b] int64, rows of all ranks
    with the same number belong together, and share the target (SupCon's form outside the log,
    2004.11362). Their sum over ranks and the engine's mean give the gradient of the global loss;
    memory is O(N D) and MOST_LOGITS.
    """
    mine, ids = _ids(len(queries), groups, queries.device)
    with torch.autocast(queries.device.type, enabled=False):  # logits near 100 need fp32
        queries, keys = _full(queries), _full(keys)
        scale = torch.as_tensor(scale, dtype=queries.dtype, device=queries.device)
        rows = _softmax(queries, gather_rows(keys), scale, mine, ids)
        columns = _softmax(keys, gather_rows(queries), scale, mine, ids)
    return (rows + columns) / 2


def sigmoid_loss(
    queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, groups: Tensor | None = None
) -> Tensor:
    """SigLIP's loss (2303.15343) over the whole global batch, own queries only.

    queries, keys, groups as in `info_nce`. The keys of other ranks come around a ring, so memory is
    O(b D). All pairs are summed and divided by the local batch. Its mean over ranks is the global
    loss; gradients as in `info_nce`, where all ranks weigh their losses alike.
    """
    mine, _ = _ids(len(queries), groups, queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        scale, bias = _full(scale).reshape(()), _full(bias).reshape(())
        loss: Tensor = _SigmoidRing.apply(_full(queries), _full(keys), scale, bias, mine)
    return loss


def gather_rows(local: Tensor) -> Tensor:
    """[b, ...] -> [world * b, ...] in rank order, with gradients to every rank's rows."""
    if dist.world_size() == 1:
        return local
    return torch.cat(dist_nn.all_gather(local), dim=0)


def _ids(size: int, groups: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a query and a key must share to belong together: of the own rows [b], of all [N]."""
    if groups is None:
        ids = torch.arange(size * dist.world_size(), device=device)
        return ids[dist.rank() * size :][:size], ids
    with torch.no_grad():
        return groups, gather_rows(groups)


def _softmax(queries: Tensor, keys: Tensor, scale: Tensor, mine: Tensor, ids: Tensor) -> Tensor:
    loss: Tensor = _SoftmaxRows.apply(queries, keys, scale.reshape(()), mine, ids)
    return loss


def _pieces(rows: int, columns: int) -> list[slice]:
    step = max(1, MOST_LOGITS // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


class _SoftmaxRows(torch.autograd.Function):
    """Cross-entropy of rows of logits that are never held all at once.

    The gradients are taken along with the loss, while a piece's logits are there.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, mine: Tensor, ids: Tensor
    ) -> Tensor:
        size, wanted = len(queries), any(ctx.needs_input_grad)
        total, d_scale = queries.new_zeros(()), queries.new_zeros(())
        d_queries, d_keys = torch.empty_like(queries), torch.zeros_like(keys)
        for piece in _pieces(size, len(keys)):
            own = queries[piece]
            cosines = own @ keys.t()
            share = (mine[piece, None] == ids).to(own.dtype)
            share /= share.sum(dim=1, keepdim=True)
            log_z = (scale * cosines).logsumexp(dim=1)
            total += log_z.sum() - scale * (share * cosines).sum()
            if wanted:
                slope = torch.exp(scale * cosines - log_z[:, None]).sub_(share)
                d_scale += (slope * cosines).sum()
                slope *= scale
                d_queries[piece] = slope @ keys
                d_keys += slope.t() @ own
        ctx.save_for_backward(d_queries / size, d_keys / size, d_scale / size)
        return total / size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_queries, d_keys, d_scale = ctx.saved_tensors
        return grad * d_queries, grad * d_keys, grad * d_scale, None, None


class _SigmoidRing(torch.autograd.Function):
    """log sigmoid of all pairs: own queries against the keys of each rank in turn.

    A block of keys travels with the gradient that the ranks add to it, and comes home with all.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, mine: Tensor
    ) -> Tensor:
        size, ids = len(queries), mine
        total, d_scale, d_bias = (queries.new_zeros(()) for _ in range(3))
        d_queries, d_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        for _ in range(dist.world_size()):
            for piece in _pieces(size, len(keys)):
                own = queries[piece]
                cosines = own @ keys.t()
                logits = scale * cosines + bias
                same = mine[piece, None] == ids
                total += F.softplus(logits).sum() - logits[same].sum()
                slope = logits.sigmoid_().sub_(same.to(logits.dtype))
                d_bias += slope.sum()
                d_scale += (slope * cosines).sum()
                slope *= scale
                d_queries[piece] += slope @ keys
                d_keys += slope.t() @ own
            keys, d_keys, ids = (_from_previous(x) for x in (keys, d_keys, ids))
        ctx.save_for_backward(d_queries / size, d_keys / size, d_scale / size, d_bias / size)
        return total / size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * saved for saved in ctx.saved_tensors), None


def _from_previous(x: Tensor) -> Tensor:
    """The tensor of the rank before, while this one's goes to the rank behind."""
    world, rank = dist.world_size(), dist.rank()
    if world == 1:
        return x
    received, peers = torch.empty_like(x), ((rank + 1) % world, (rank - 1) % world)
    operations = [
        torch.distributed.P2POp(torch.distributed.isend, x.contiguous(), peers[0]),
        torch.distributed.P2POp(torch.distributed.irecv, received, peers[1]),
    ]
    for work in torch.distributed.batch_isend_irecv(operations):
        work.wait()
    return received


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
