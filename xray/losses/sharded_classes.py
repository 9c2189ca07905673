"""Losses over classes whose rows of the head are divided over ranks (2010.05222, 2203.15565).

Each rank computes the logits of its own classes for the samples of all ranks. Ranks exchange
features, and the loss's reductions over classes; logits and rows of the head stay where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xray import dist
from xray.losses.chunked_classes import chunk_gradients, product_dtype, reduce_chunks

if TYPE_CHECKING:
    from xray.losses.tags import TagLoss


def sharded_loss(
    loss: TagLoss,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    tags: Tensor,
    targets: Tensor,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Compute losses [b] and likeliest classes [b] of own features [b, D]; collective.

    weight, bias: the `dist.rows_of` this rank of a head of `classes`. tags, targets: [b, K] of own
    samples, with the same b and K on all ranks. The gradient of the features is that of the own
    losses. The gradients of weight and bias are those of the losses' mean over ranks: they are
    complete, and must not be averaged again.
    """
    total, picked, top = _Sharded.apply(features, weight, bias, tags, loss, classes)
    return loss.combine(total, picked, tags, targets), top


class _Sharded(torch.autograd.Function):
    """`total`, the logits of the own tags and the likeliest class of own samples."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        tags: Tensor,
        loss: TagLoss,
        classes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.loss, ctx.classes, ctx.dtype = loss, classes, features.dtype
        first = dist.rows_of(dist.rank(), classes).start
        rows = dist.gather_rows(features.to(product_dtype(features)).contiguous())
        local = dist.gather_rows(tags.contiguous()) - first
        state, picked, highest, top = reduce_chunks(rows, weight, bias, local, loss)
        state, top = loss.join_ranks(state), _likeliest(highest, top + first)
        ctx.save_for_backward(rows, weight, bias, local, state)
        own = slice(dist.rank() * len(tags), (dist.rank() + 1) * len(tags))
        top = top[own].clone()
        ctx.mark_non_differentiable(top)
        return loss.total(state, classes)[own].clone(), dist.sum_rows(picked), top

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor, grad_picked: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, weight, bias, local, state = ctx.saved_tensors
        given = dist.gather_rows(torch.cat([grad_total.unsqueeze(1), grad_picked], dim=1))
        parts = rows, weight, bias, local, ctx.loss, state, ctx.classes
        grad_rows, *grad_head = chunk_gradients(
            *parts, given[:, 0], given[:, 1:], ctx.needs_input_grad
        )
        grad_features = None if grad_rows is None else dist.sum_rows(grad_rows).to(ctx.dtype)
        means = (None if grad is None else grad.div_(dist.world_size()) for grad in grad_head)
        return grad_features, *means, None, None, None


def _likeliest(highest: Tensor, top: Tensor) -> Tensor:
    """Return the class of the highest logit over ranks [N]; of equal ones the last."""
    best = dist.largest_over_ranks(highest.clone())
    return dist.largest_over_ranks(torch.where(highest == best, top, -1))
