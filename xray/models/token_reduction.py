"""Token reduction inside chosen blocks: fewer tokens after the attention, without parameters.

All methods have one interface, `reduce(x, q, k, state, spec) -> (x, state)`, called between the
attention residual and the MLP. Shapes: x [B, P + n, D], q and k [B, H, P + n, d], for B samples, P
prefix tokens (CLS first, if there is one), n patch tokens, width D, H heads of width d; N0 input
tokens. EViT's score of a token depends on how the model pools its tokens (`model.pool`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray.config import ModelConfig
from xray.errors import ConfigError
from xray.models.rotary import kept_rotation

KeepRate = float | Sequence[float]  # one rate for all reducing blocks, or one rate per block


class TokenState(NamedTuple):
    """State of the reduction, passed from block to block."""

    sizes: Tensor | None = None  # input tokens merged into each token, [B, P + n]
    assign: tuple[Tensor, ...] | None = None  # [B, N0] long per reducing block so far, see `Tokens`
    proportional: bool = True  # the sizes are part of the attention
    rotation: Tensor | None = None  # of rotary positions, [1 or B, n, 2 * d], see `rotary`


class PoolingHead(NamedTuple):
    """The part of a pooling head that gives its attention, see `head_attention`."""

    norm: nn.Module  # the model's final norm, which the head's input has passed
    query: Tensor  # latent query times key weights of each head, [H, D]
    first: int  # number of prefix tokens that the head does not attend to


class Spec(NamedTuple):
    """Parameters of one reduction."""

    kind: str  # method, a key of REDUCTIONS
    kept: int  # patch tokens to keep
    fuse: bool  # fuse the other tokens into one additional token
    prefix: int  # number of prefix tokens
    training: bool  # the model is in training mode
    pool: str = "cls"  # how the model pools tokens, which decides how they are scored
    head: PoolingHead | None = None  # of pool "map"


Reduce = Callable[[Tensor, Tensor, Tensor, TokenState, Spec], tuple[Tensor, TokenState]]


def kept_tokens(tokens: int, rate: float) -> int:
    """Return ceil(rate * tokens), tolerating rounding such as .55 * 20 = 11.000000000000002."""
    return math.ceil(rate * tokens - 1e-6)


def rate_at(progress: float, keep_rate: float, levels: int, span: list[float]) -> float:
    """Return the keep rate at a training progress in [0, 1].

    The rate falls from 1 to `keep_rate` over `span` along a half cosine, in `levels` steps, which
    limit the number of different token counts.
    """
    start, end = span
    share = 1.0 if progress >= end else max((progress - start) / max(end - start, 1e-12), 0.0)
    level = math.floor((1 - math.cos(math.pi * share)) / 2 * levels + 1e-9)
    return 1 - (1 - keep_rate) * level / levels if level < levels else keep_rate


def keep_rate_at(model: ModelConfig, progress: float) -> KeepRate:
    """Return a model's scheduled keep rate at a progress; a list if `keep_rates` is per block."""
    if model.reduce == "none":
        return 1.0
    levels, span = model.keep_rate_levels, model.keep_rate_span
    rates = [rate_at(progress, rate, levels, span) for rate in model.final_rates]
    return rates[0] if model.keep_rates is None else rates


def cls_attention(q: Tensor, k: Tensor, prefix: int) -> Tensor:
    """Return CLS's attention to each patch token, averaged over heads, [B, n], in fp32 or fp64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        row = q[:, :, :1].to(dtype) @ k.to(dtype).transpose(-2, -1) * q.shape[-1] ** -0.5
    return row.softmax(dim=-1)[:, :, 0, prefix:].mean(dim=1)


@torch.no_grad()
def received_attention(q: Tensor, k: Tensor, prefix: int) -> Tensor:
    """Return the mean attention of the patch tokens to each patch token, over heads, [B, n].

    It has no gradient. Heads follow one another: the attention of all heads is a large tensor.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    total = q.new_zeros((), dtype=dtype)
    with torch.autocast(q.device.type, enabled=False):
        for head in range(q.shape[1]):
            queries, keys = q[:, head, prefix:].to(dtype), k[:, head].to(dtype)
            logits = queries @ keys.transpose(-2, -1) * q.shape[-1] ** -0.5
            total = total + logits.softmax(dim=-1)[..., prefix:].mean(dim=1)
    return total / q.shape[1]


@torch.no_grad()
def head_attention(x: Tensor, head: PoolingHead, prefix: int) -> Tensor:
    """Return the pooling head's attention to each patch token, averaged over its heads, [B, n].

    The head's latent query attends to x [B, P + n, D], the tokens after the attention of the
    reducing block, through the final norm: as if the model ended here. It has no gradient.
    """
    normed = head.norm(x[:, head.first :])
    dtype = torch.promote_types(normed.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        logits = normed.to(dtype) @ head.query.to(dtype).t()
    return logits.softmax(dim=1)[:, prefix - head.first :].mean(dim=2)


def importance(x: Tensor, q: Tensor, k: Tensor, spec: Spec) -> Tensor:
    """Score the patch tokens, [B, n], by the attention with which the model pools them."""
    if spec.head is not None:
        return head_attention(x, spec.head, spec.prefix)
    if spec.pool == "mean":
        return received_attention(q, k, spec.prefix)
    return cls_attention(q, k, spec.prefix)


def reduce_tokens(
    x: Tensor, q: Tensor, k: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """Run the reduction of the spec; if it would remove no token, only update `assign`."""
    B, n = x.shape[0], x.shape[1] - spec.prefix
    if spec.kept < n and not (spec.kind == "tome" and spec.kept + spec.fuse >= n):
        return REDUCTIONS[spec.kind](x, q, k, state, spec)
    if state.assign is not None:
        state = _reassigned(state, torch.arange(n, device=x.device).expand(B, -1))
    return x, state


def evit(
    x: Tensor, q: Tensor, k: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """Keep the tokens that CLS attends to most and fuse the others into one (EViT, 2202.07800).

    The fused token is the sum of the others, weighted by their attention without renormalisation.
    A model that does not pool by CLS has other attention scores, see `importance`.
    """
    attention = importance(x, q, k, spec)
    return _keep(x, attention, attention, state, spec)


def random(
    x: Tensor, q: Tensor, k: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """Reduce like EViT with a random choice of tokens, as the control; fixed in evaluation."""
    attention = importance(x, q, k, spec)
    if spec.training:
        scores = torch.rand_like(attention)
    else:
        # a hash of the token's position replaces random numbers
        positions = torch.arange(1, attention.shape[1] + 1, device=x.device, dtype=torch.float64)
        scores = ((positions * 12.9898).sin() * 43758.5453).frac().expand_as(attention)
    return _keep(x, scores, attention, state, spec)


def _keep(
    x: Tensor, scores: Tensor, attention: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """Keep the patch tokens with the highest scores [B, n], best first; fuse or drop the rest."""
    B, n, P = x.shape[0], x.shape[1] - spec.prefix, spec.prefix
    index = scores.topk(spec.kept, dim=1).indices  # [B, k]
    patches = x[:, P:]
    parts = [x[:, :P], patches.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))]
    if spec.fuse:
        weights = attention.scatter(1, index, 0.0).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            parts.append(weights[:, None] @ patches)  # [B, 1, D]
    if state.rotation is not None:
        state = state._replace(rotation=kept_rotation(state.rotation, index, spec.fuse))
    if state.assign is not None:
        rest = spec.kept if spec.fuse else -1
        new_index = torch.full((B, n), rest, dtype=torch.long, device=x.device)
        new_index.scatter_(1, index, torch.arange(spec.kept, device=x.device).expand(B, -1))
        state = _reassigned(state, new_index)
    return torch.cat(parts, dim=1), state


def tome(
    x: Tensor, q: Tensor, k: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """Merge the most similar tokens until as many remain as with EViT (ToMe, 2210.09461).

    Each token at an even position of the sequence is matched to the most similar token at an odd
    position, by the cosine of the keys' mean over heads. The most similar pairs are merged into
    size-weighted means. A merged token has the rotary position of its token at the odd position,
    and rotated keys are compared. Raises ConfigError if there are fewer pairs than merges.
    """
    B, n, P = x.shape[0], x.shape[1] - spec.prefix, spec.prefix
    merges = n - (spec.kept + spec.fuse)
    even = P % 2  # the first patch token at an even position of the whole sequence
    dtype = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # bf16 would round close cosines to ties
        metric = F.normalize(k.to(dtype).mean(dim=1)[:, P:], dim=-1)
        similarity = metric[:, even::2] @ metric[:, 1 - even :: 2].transpose(1, 2)  # [B, a, b]
    if merges > similarity.shape[1]:
        raise ConfigError(
            f"model.reduce=tome cannot merge {merges} of {n} tokens: set model.keep_rate (or "
            "model.keep_rates) to at least 0.5"
        )
    best, partner = similarity.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, stay = order[:, :merges], order[:, merges:].sort(dim=1).values
    target = partner.gather(1, merged)

    sizes = state.sizes
    if sizes is None:
        sizes = torch.ones(B, P + n, dtype=dtype, device=x.device)
    scale = sizes[:, P:, None].to(x.dtype)
    weighted = torch.cat([x[:, P:] * scale, scale], dim=2)  # the last channel sums the sizes
    sources, targets = weighted[:, even::2], weighted[:, 1 - even :: 2]

    def pick(index: Tensor) -> Tensor:
        return sources.gather(1, index[..., None].expand(-1, -1, sources.shape[-1]))

    into = target[..., None].expand(-1, -1, weighted.shape[-1])
    joined = torch.cat([pick(stay), targets.scatter_add(1, into, pick(merged))], dim=1)
    x = torch.cat([x[:, :P], joined[..., :-1] / joined[..., -1:]], dim=1)
    # Detach: the gradient is zero, and an attention mask with gradient disables fused kernels.
    sizes = torch.cat([sizes[:, :P], joined[..., -1].detach().to(sizes.dtype)], dim=1)
    if state.rotation is not None:
        rotation = state.rotation.expand(B, -1, -1)
        own = kept_rotation(rotation[:, even::2], stay, False)
        state = state._replace(rotation=torch.cat([own, rotation[:, 1 - even :: 2]], dim=1))
    if state.assign is not None:
        first = stay.shape[1]  # index of the first target: targets follow unmerged sources
        new_index = torch.empty(B, n, dtype=torch.long, device=x.device)
        new_index[:, 1 - even :: 2] = torch.arange(first, first + targets.shape[1], device=x.device)
        source_index = torch.empty(B, sources.shape[1], dtype=torch.long, device=x.device)
        source_index.scatter_(1, stay, torch.arange(first, device=x.device).expand(B, -1))
        source_index.scatter_(1, merged, target + first)
        new_index[:, even::2] = source_index
        state = _reassigned(state, new_index)
    return x, state._replace(sizes=sizes)


def group_sizes(assign: Tensor) -> Tensor:
    """Count the input tokens that share each input token's token, [B, n]; any if dropped."""
    place = assign.clamp(min=0)
    count = torch.zeros(len(assign), int(assign.max()) + 1, device=assign.device)
    return count.scatter_add(1, place, (assign >= 0).float()).gather(1, place)


def kept_alone(assign: Tensor) -> Tensor:
    """Return which input tokens have a token of their own, [B, n] bool: the others were merged,
    fused or dropped."""
    return (group_sizes(assign) == 1) & (assign >= 0)


def size_bias(state: TokenState, dtype: torch.dtype) -> Tensor | None:
    """Return ToMe's bias of the attention logits: each key's log size, [B, 1, 1, N], or None."""
    if state.sizes is None or not state.proportional:
        return None
    return state.sizes.log()[:, None, None].to(dtype)


def _reassigned(state: TokenState, new_index: Tensor) -> TokenState:
    """Append the input tokens' assignment after each of n tokens got a new index, [B, n]."""
    assert state.assign is not None
    if not state.assign:
        return state._replace(assign=(new_index,))
    before = state.assign[-1]
    now = new_index.gather(1, before.clamp(min=0)).where(before >= 0, before)
    return state._replace(assign=(*state.assign, now))


REDUCTIONS: dict[str, Reduce] = {"evit": evit, "tome": tome, "random": random}
