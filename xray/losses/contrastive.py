"""Losses: functions of tensors, in fp32 or better. The contrastive ones alone know of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xray import dist
from xray.losses.precision import full_precision

# Logits that are held at a time: a contrast of more is gone through in groups of rows.
MOST_LOGITS = 1 << 24


def info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE over the whole global batch: the mean of `contrast` both ways.

    No id may be below 0: every key is a query, too.
    """
    rows = contrast(queries, keys, scale, query_ids, key_ids)
    return (rows + contrast(keys, queries, scale, key_ids, query_ids)) / 2


def contrast(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of own queries to find their keys among those of all ranks; their mean.

    queries, keys: [b, D], [m, D] normalised; row i belongs to row i, or, with ids [b] and [m]
    int64, to all keys of its id, which share the target (SupCon's form outside the log,
    2004.11362). A key of an id below 0 is left out. The mean over ranks gives value and gradient of
    the global loss; memory is O(N D) and MOST_LOGITS.
    """
    mine = row_ids(queries) if query_ids is None else query_ids
    ids = _all_ids(len(keys), key_ids, keys.device)
    with _exactly(queries):
        queries, found = full_precision(queries), gather_rows(full_precision(keys))
        if key_ids is not None:
            found, ids = found[ids >= 0], ids[ids >= 0]

        def share(piece: slice) -> Tensor:
            same = (mine[piece, None] == ids).to(queries.dtype)
            return same.div_(same.sum(dim=1, keepdim=True))

        loss: Tensor = _SoftmaxRows.apply(queries, found, _scalar(scale, queries), share)
    return loss


def distillation(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    teacher_scale: Tensor | float,
) -> Tensor:
    """Cross-entropy of a teacher's softmax over all keys, both ways (CLIP-KD's CRD, 2307.12732).

    Student's and teacher's rows [b, D] and [b, E], normalised, are of the same samples. It is the
    Kullback-Leibler divergence and the teacher's entropy.
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
                return (sharp * a[piece] @ b.t()).softmax(dim=1).to(full_precision(queries).dtype)  # noqa: B023

            rows = gather_rows(full_precision(others))
            total = total + _SoftmaxRows.apply(
                full_precision(own), rows, _scalar(scale, own), share
            )
    return total / 2


def sigmoid_loss(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """SigLIP's loss (2303.15343) over the whole global batch, own queries only.

    queries, keys and their ids as in `info_nce`. The keys of other ranks come around a ring, so
    memory is O(m D). All pairs are summed and divided by the local keys. Its mean over ranks is the
    global loss; gradients as in `contrast`, where all ranks weigh their losses alike.
    """
    mine = row_ids(queries) if query_ids is None else query_ids
    ids = row_ids(keys) if key_ids is None else key_ids
    with _exactly(queries):
        sides = full_precision(queries), full_precision(keys)
        scale, bias = _scalar(scale, queries), _scalar(bias, queries)
        loss: Tensor = _SigmoidRing.apply(*sides, scale, bias, mine, ids)
    return loss


def gather_rows(local: Tensor) -> Tensor:
    """[b, ...] -> [world * b, ...] in rank order, with gradients to every rank's rows."""
    if dist.world_size() == 1:
        return local
    rows: Tensor = _GatherRows.apply(local.contiguous())
    return rows


def row_ids(rows: Tensor) -> Tensor:
    """[b]: the numbers of own rows among those of all ranks."""
    return len(rows) * dist.rank() + torch.arange(len(rows), device=rows.device)


def _all_ids(size: int, own: Tensor | None, device: torch.device) -> Tensor:
    """The ids of all ranks' rows, [N]."""
    if own is None:
        return torch.arange(size * dist.world_size(), device=device)
    with torch.no_grad():
        return gather_rows(own)


def _exactly(rows: Tensor) -> Any:
    """Logits near 100 need fp32."""
    return torch.autocast(rows.device.type, enabled=False)


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=full_precision(like).dtype, device=like.device).reshape(())


def _pieces(rows: int, columns: int) -> list[slice]:
    step = max(1, MOST_LOGITS // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; the gradient of own rows is the sum of what all ranks have for them."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return dist.gather_rows(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return dist.sum_rows(grad)


class _SoftmaxRows(torch.autograd.Function):
    """Cross-entropy of rows of logits that are never held all at once.

    The gradients are taken along with the loss, while a piece's logits are there.
    share(piece) is what each key of a piece of rows is to get of the softmax, [rows, N].
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, share: Callable[[slice], Tensor]
    ) -> Tensor:
        size, wanted = len(queries), any(ctx.needs_input_grad)
        total, d_scale = queries.new_zeros(()), queries.new_zeros(())
        d_queries, d_keys = torch.empty_like(queries), torch.zeros_like(keys)
        for piece in _pieces(size, len(keys)):
            own = queries[piece]
            cosines = own @ keys.t()
            wished = share(piece)
            log_z = (scale * cosines).logsumexp(dim=1)
            total += log_z.sum() - scale * (wished * cosines).sum()
            if wanted:
                slope = torch.exp(scale * cosines - log_z[:, None]).sub_(wished)
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
        return grad * d_queries, grad * d_keys, grad * d_scale, None


class _SigmoidRing(torch.autograd.Function):
    """log sigmoid of all pairs: own queries against the keys of each rank in turn.

    A block of keys travels with the gradient that the ranks add to it, and comes home with all.
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
        return *(grad * saved for saved in ctx.saved_tensors), None, None


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
