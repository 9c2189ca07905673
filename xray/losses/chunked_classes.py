"""Logits over many classes, computed one chunk of classes at a time in both passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xray.losses.precision import full_precision

if TYPE_CHECKING:
    from xray.losses.tags import TagLoss


class Chunked(torch.autograd.Function):
    """`total`, the logits of the own tags and the likeliest class, one chunk of classes at a time.

    There is never a [B, V] tensor: the backward pass computes the logits again, and writes each
    chunk of the weight's gradient to its place.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, tags: Tensor, loss: TagLoss
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.loss, ctx.dtype = loss, product_dtype(features)
        low = features.to(ctx.dtype)
        state, picked, _, top = reduce_chunks(low, weight, bias, tags, loss)
        ctx.save_for_backward(features, weight, bias, tags, state)
        ctx.mark_non_differentiable(top)
        return loss.total(state, len(weight)), picked, top

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor, grad_picked: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        features, weight, bias, tags, state = ctx.saved_tensors
        parts = features.to(ctx.dtype), weight, bias, tags, ctx.loss, state, len(weight)
        grad_features, *others = chunk_gradients(
            *parts, grad_total, grad_picked, ctx.needs_input_grad
        )
        if grad_features is not None:
            grad_features = grad_features.to(features.dtype)
        return grad_features, *others, None, None


def product_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of matrix products, as F.linear chooses it under autocast."""
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return features.dtype


def reduce_chunks(
    features: Tensor, weight: Tensor, bias: Tensor, tags: Tensor, loss: TagLoss
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss's reduction over classes, own logits [B, K], highest logit and its class [B].

    features: [B, D] in the dtype of the products. weight, bias: [C, D], [C]. tags: [B, K]; the
    logits of ids that are not in [0, C) are 0.
    """
    empty = full_precision(features[:, :0])
    state, picked = loss.reduce(empty), empty.new_zeros(tags.shape)
    highest, top = empty.new_full(tags.shape[:1], -math.inf), tags.new_zeros(len(tags))
    for piece, _, logits in _chunks(features, weight, bias, loss.chunk):
        index, inside = _own_in(piece, tags)
        state = loss.join(state, loss.reduce(logits))
        picked = torch.where(inside, logits.gather(1, index), picked)
        value, place = logits.max(dim=1)
        top = torch.where(value > highest, place + piece.start, top)
        highest = torch.maximum(value, highest)
    return state, picked, highest, top


def chunk_gradients(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    tags: Tensor,
    loss: TagLoss,
    state: Tensor,
    classes: int,
    grad_total: Tensor,
    grad_picked: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of features, weight and bias, for those of `reduce_chunks`.

    state, classes: the reduction over all classes, of which `weight` may have a part. needed: of
    the three gradients; the features' is in fp32 or better.
    """
    grad_features = full_precision(torch.zeros_like(features)) if needed[0] else None
    grad_weight = torch.empty_like(weight) if needed[1] else None
    grad_bias = torch.empty_like(bias) if needed[2] else None
    for piece, rows, logits in _chunks(features, weight, bias, loss.chunk):
        index, inside = _own_in(piece, tags)
        slope = loss.slope(logits, state, classes).mul_(grad_total.unsqueeze(1))
        slope.scatter_add_(1, index, grad_picked * inside)
        if grad_bias is not None:
            grad_bias[piece] = slope.sum(dim=0)
        slope = slope.to(features.dtype)
        if grad_features is not None:
            grad_features += slope @ rows
        if grad_weight is not None:
            grad_weight[piece] = slope.t() @ features
    return grad_features, grad_weight, grad_bias


def _chunks(
    features: Tensor, weight: Tensor, bias: Tensor, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield chunks of classes: their slice, rows [C, D] in the features' dtype, logits [B, C]."""
    for start in range(0, len(weight), chunk or len(weight)):
        piece = slice(start, min(start + (chunk or len(weight)), len(weight)))
        rows = weight[piece].to(features.dtype)
        yield piece, rows, full_precision(F.linear(features, rows, bias[piece].to(features.dtype)))


def _own_in(piece: slice, tags: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places [B, K] of tags in a chunk of classes, and a mask of those inside it."""
    inside = (tags >= piece.start) & (tags < piece.stop)
    return (tags - piece.start).clamp(0, piece.stop - piece.start - 1), inside
