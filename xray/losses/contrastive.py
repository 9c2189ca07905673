"""Contrastive losses over the global batch of all ranks, in fp32 or better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xray import dist
from xray.losses.precision import full_precision

# Logits in memory at a time; larger contrasts are computed in groups of rows.
MOST_LOGITS = 1 << 24
Scale = Tensor | float
Ids = Tensor | None  # of the rows of queries or keys; rows of the same id are positives


def info_nce(
    queries: Tensor, keys: Tensor, scale: Scale, query_ids: Ids = None, key_ids: Ids = None
) -> Tensor:
    """Compute symmetric InfoNCE over the global batch: the mean of `contrast` in both directions.

    No id may be below 0, because every key is also a query.
    """
    rows = contrast(queries, keys, scale, query_ids, key_ids)
    return (rows + contrast(keys, queries, scale, key_ids, query_ids)) / 2


def contrast(
    queries: Tensor, keys: Tensor, scale: Scale, query_ids: Ids = None, key_ids: Ids = None
) -> Tensor:
    """Compute the mean cross-entropy of own queries against the keys of all ranks.

    queries, keys: [b, D], [m, D] normalised. Query i belongs to key i or, with ids [b] and [m]
    int64, to all keys of its id, which share the target (SupCon's form outside the log,
    2004.11362). Keys of an id below 0 are left out. The mean over ranks has the value and gradient
    of the global loss. Memory is O(N D) plus MOST_LOGITS.
    """
    mine = row_ids(queries) if query_ids is None else query_ids
    if key_ids is None:
        ids = torch.arange(len(keys) * dist.world_size(), device=keys.device)
    else:
        ids = gather_rows(key_ids)
    with _exactly(queries):
        queries, keys = full_precision(queries), gather_rows(full_precision(keys))
        offset = None
        if key_ids is not None:  # to select the other keys, the host would wait for their number
            offset = queries.new_zeros(len(keys)).masked_fill_(ids < 0, -math.inf)

        def share(piece: slice) -> Tensor:
            same = (mine[piece, None] == ids).to(queries.dtype)
            return same.div_(same.sum(dim=1, keepdim=True))

        loss: Tensor = _SoftmaxRows.apply(queries, keys, _scalar(scale, queries), share, offset)
    return loss


def distillation(
    queries: Tensor,
    keys: Tensor,
    scale: Scale,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    teacher_scale: Scale,
) -> Tensor:
    """Compute cross-entropy with a teacher's softmax over all keys, in both directions.

    It is the Kullback-Leibler divergence plus the teacher's entropy (CLIP-KD's CRD, 2307.12732).
    The rows of student [b, D] and teacher [b, E] are normalised and of the same samples.
    """
    ways = ((queries, keys, teacher_queries, teacher_keys),
            (keys, queries, teacher_keys, teacher_queries))  # fmt: skip
    total = queries.new_zeros((), dtype=full_precision(queries).dtype)
    for own, others, teacher, teacher_others in ways:
        with _exactly(own):
            with torch.no_grad():
                known, among = full_precision(teacher), gather_rows(full_precision(teacher_others))
                sharp = _scalar(teacher_scale, known)

            def share(piece: slice, a: Tensor = known, b: Tensor = among) -> Tensor:
                return (sharp * a[piece] @ b.t()).softmax(dim=1).to(total.dtype)  # noqa: B023

            own, rows = full_precision(own), gather_rows(full_precision(others))
            total = total + _SoftmaxRows.apply(own, rows, _scalar(scale, own), share, None)
    return total / 2


def sigmoid_loss(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """Compute SigLIP's loss (2303.15343) of own queries over the global batch.

    queries, keys and their ids as in `info_nce`. Keys of other ranks arrive around a ring, so
    memory is O(m D). The sum over all pairs is divided by the number of local keys. The mean over
    ranks is the global loss; gradients as in `contrast`, if all ranks weigh their losses equally.
    """
    mine = row_ids(queries) if query_ids is None else query_ids
    ids = row_ids(keys) if key_ids is None else key_ids
    with _exactly(queries):
        sides = full_precision(queries), full_precision(keys)
        scale, bias = _scalar(scale, queries), _scalar(bias, queries)
        loss: Tensor = _SigmoidRing.apply(*sides, scale, bias, mine, ids)
    return loss


def gather_rows(local: Tensor) -> Tensor:
    """Gather [b, ...] -> [world * b, ...] in rank order, with gradients to every rank's rows."""
    if dist.world_size() == 1:
        return local
    rows: Tensor = _GatherRows.apply(local.contiguous())
    return rows


def row_ids(rows: Tensor) -> Tensor:
    """Number own rows among those of all ranks, [b]."""
    return len(rows) * dist.rank() + torch.arange(len(rows), device=rows.device)


def _exactly(rows: Tensor) -> Any:
    """Disable autocast: logits near 100 need fp32."""
    return torch.autocast(rows.device.type, enabled=False)


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    dtype = full_precision(like).dtype
    if isinstance(value, Tensor):
        return value.to(like.device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=like.device)  # a tensor of it would be copied


def _pieces(rows: int, columns: int) -> list[slice]:
    step = max(1, MOST_LOGITS // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks; the gradient of own rows is the sum of all ranks' gradients for them."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return dist.gather_rows(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return dist.sum_rows(grad)


class _SoftmaxRows(torch.autograd.Function):
    """Cross-entropy of rows of logits that are never in memory all at once.

    The forward pass also computes the gradients, from the same logits. share(piece) is the target
    distribution of a piece of rows over the keys, [rows, N]. offset: added to the logits, [N]; a
    key with -inf has probability 0, and must have no share.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        share: Callable[[slice], Tensor],
        offset: Tensor | None,
    ) -> Tensor:
        size, needs_grad = len(queries), any(ctx.needs_input_grad)
        total, d_scale = queries.new_zeros(()), queries.new_zeros(())
        d_queries, d_keys = torch.empty_like(queries), torch.zeros_like(keys)
        for piece in _pieces(size, len(keys)):
            own = queries[piece]
            cosines = own @ keys.t()
            target = share(piece)
            logits = scale * cosines
            if offset is not None:
                logits += offset
            log_z = logits.logsumexp(dim=1)
            total += log_z.sum() - scale * (target * cosines).sum()
            if needs_grad:
                slope = logits.sub_(log_z[:, None]).exp_().sub_(target)
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
    """Log sigmoid of all pairs: own queries against the keys of each rank in turn.

    A block of keys travels around the ring together with its gradient, to which each rank adds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        bias: Tensor,
        mine: Tensor,
        ids: Tensor,
    ) -> Tensor:
        size = len(keys)
        total, d_scale, d_bias = (queries.new_zeros(()) for _ in range(3))
        d_queries, d_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        for _ in range(dist.world_size()):
            for piece in _pieces(len(queries), size):
                own = queries[piece]
                cosines = own @ keys.t()
                logits = scale * cosines + bias
                same = (mine[piece, None] == ids).to(logits.dtype)
                total += F.softplus(logits).sum() - (same * logits).sum()
                slope = logits.sigmoid_().sub_(same)
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
        return *(grad * saved for saved in ctx.saved_tensors), None, None


def _from_previous(x: Tensor) -> Tensor:
    """Receive the tensor of the previous rank, and send this one to the next."""
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
