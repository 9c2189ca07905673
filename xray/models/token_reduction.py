"""Token reduction inside chosen blocks: fewer tokens after the attention, no parameters.

One interface: `reduce(x, q, k, state, spec) -> (x, state)`, called after the attention residual,
before the MLP. x: [B, P + n, D] with P prefix tokens (CLS first), q and k: [B, H, P + n, d].

B batch, n patch tokens, P prefix tokens, D width, H heads, d head width, N0 input tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xray.config import ModelConfig
from xray.errors import ConfigError

KeepRate = float | Sequence[float]  # for all reducing blocks, or one for each


class TokenState(NamedTuple):
    """What reduction carries from block to block.

    sizes: [B, P + n], how many input tokens each token holds; None while nothing was merged.
    assign: the patch token each input token lies in after each reducing block so far, every one
        [B, N0] long, -1 for a token that was dropped; None where nobody asked for it.
    """

    sizes: Tensor | None = None
    assign: tuple[Tensor, ...] | None = None


class Spec(NamedTuple):
    """One reduction: patch tokens to keep, whether the others are fused into one more token."""

    kept: int
    fuse: bool
    prefix: int
    training: bool


Reduce = Callable[[Tensor, Tensor, Tensor, TokenState, Spec], tuple[Tensor, TokenState]]


def kept_tokens(tokens: int, rate: float) -> int:
    """ceil(rate * tokens), safe against products such as .55 * 20 = 11.000000000000002."""
    return math.ceil(rate * tokens - 1e-6)


def rate_at(progress: float, keep_rate: float, levels: int, span: list[float]) -> float:
    """The keep rate at a stage's progress: a half cosine from 1 over `span`, in `levels` steps.

    The rate steps and not the token count, so that few shapes occur and the last is the target.
    """
    start, end = span
    share = 1.0 if progress >= end else max((progress - start) / max(end - start, 1e-12), 0.0)
    level = math.floor((1 - math.cos(math.pi * share)) / 2 * levels + 1e-9)
    return 1 - (1 - keep_rate) * level / levels if level < levels else keep_rate


def keep_rate_at(model: ModelConfig, progress: float) -> KeepRate:
    """The keep rate that a model's schedule has come to; a list where blocks have their own."""
    if model.reduce == "none":
        return 1.0
    levels, span = model.keep_rate_levels, model.keep_rate_span
    rates = [rate_at(progress, rate, levels, span) for rate in model.final_rates]
    return rates[0] if model.keep_rates is None else rates


def cls_attention(q: Tensor, k: Tensor, prefix: int) -> Tensor:
    """The CLS token's attention to each patch token, mean over heads, fp32 or better: [B, n]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        row = q[:, :, :1].to(dtype) @ k.to(dtype).transpose(-2, -1) * q.shape[-1] ** -0.5
    return row.softmax(dim=-1)[:, :, 0, prefix:].mean(dim=1)


def reduce_tokens(
    kind: str, x: Tensor, q: Tensor, k: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """One reduction of `kind`; where no token would go, only `assign` is continued."""
    B, n = x.shape[0], x.shape[1] - spec.prefix
    if spec.kept < n and not (kind == "tome" and spec.kept + spec.fuse >= n):
        return REDUCTIONS[kind](x, q, k, state, spec)
    if state.assign is not None:
        state = _moved(state, torch.arange(n, device=x.device).expand(B, -1))
    return x, state


def evit(
    x: Tensor, q: Tensor, k: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """Keep the tokens the CLS attends to most and fuse the others into one (EViT, 2202.07800).

    The fused token is the sum of the others weighted by their raw attention, not renormalised; a
    later reducing block treats it like any other token.
    """
    attention = cls_attention(q, k, spec.prefix)
    return _keep(x, attention, attention, state, spec)


def random(
    x: Tensor, q: Tensor, k: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """The control: EViT with a random choice; in evaluation a fixed one for all samples."""
    attention = cls_attention(q, k, spec.prefix)
    if spec.training:
        scores = torch.rand_like(attention)
    else:
        places = torch.arange(1, attention.shape[1] + 1, device=x.device, dtype=torch.float64)
        scores = ((places * 12.9898).sin() * 43758.5453).frac().expand_as(attention)
    return _keep(x, scores, attention, state, spec)


def _keep(
    x: Tensor, scores: Tensor, attention: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """Keep the `spec.kept` patch tokens of highest score, best first; fuse or drop the others."""
    B, n, P = x.shape[0], x.shape[1] - spec.prefix, spec.prefix
    index = scores.topk(spec.kept, dim=1).indices  # [B, k]
    patches = x[:, P:]
    parts = [x[:, :P], patches.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))]
    if spec.fuse:
        weights = attention.scatter(1, index, 0.0).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            parts.append(weights[:, None] @ patches)  # [B, 1, D]
    if state.assign is not None:
        rest = spec.kept if spec.fuse else -1
        place = torch.full((B, n), rest, dtype=torch.long, device=x.device)
        place.scatter_(1, index, torch.arange(spec.kept, device=x.device).expand(B, -1))
        state = _moved(state, place)
    return torch.cat(parts, dim=1), state


def tome(
    x: Tensor, q: Tensor, k: Tensor, state: TokenState, spec: Spec
) -> tuple[Tensor, TokenState]:
    """Merge the most similar tokens until as many are left as EViT leaves (ToMe, 2210.09461).

    Tokens at even places of the sequence look for their best partner, by the cosine of the keys'
    mean over heads, among those at odd places; the best pairs become size-weighted means. Prefix
    tokens stay out of it. Raises ConfigError for more merges than there are pairs.
    """
    B, n, P = x.shape[0], x.shape[1] - spec.prefix, spec.prefix
    merges = n - (spec.kept + spec.fuse)
    even = P % 2  # the first patch token at an even place of the whole sequence
    dtype = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # close cosines must stay apart
        metric = F.normalize(k.to(dtype).mean(dim=1)[:, P:], dim=-1)
        similarity = metric[:, even::2] @ metric[:, 1 - even :: 2].transpose(1, 2)  # [B, a, b]
    if merges > similarity.shape[1]:
        raise ConfigError(f"reduce=tome cannot merge {merges} of {n} tokens: keep_rate must be .5+")
    best, partner = similarity.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, stay = order[:, :merges], order[:, merges:].sort(dim=1).values
    target = partner.gather(1, merged)

    sizes = state.sizes
    if sizes is None:
        sizes = torch.ones(B, P + n, dtype=dtype, device=x.device)
    scale = sizes[:, P:, None].to(x.dtype)
    weighted = torch.cat([x[:, P:] * scale, scale], dim=2)  # the size travels as a last channel
    sources, targets = weighted[:, even::2], weighted[:, 1 - even :: 2]

    def pick(index: Tensor) -> Tensor:
        return sources.gather(1, index[..., None].expand(-1, -1, sources.shape[-1]))

    into = target[..., None].expand(-1, -1, weighted.shape[-1])
    joined = torch.cat([pick(stay), targets.scatter_add(1, into, pick(merged))], dim=1)
    x = torch.cat([x[:, :P], joined[..., :-1] / joined[..., -1:]], dim=1)
    # without its gradient, which is zero but would keep attention from its fused kernels
    sizes = torch.cat([sizes[:, :P], joined[..., -1].detach().to(sizes.dtype)], dim=1)
    if state.assign is not None:
        first = stay.shape[1]  # of the targets, which follow those that stay
        place = torch.empty(B, n, dtype=torch.long, device=x.device)
        place[:, 1 - even :: 2] = torch.arange(first, first + targets.shape[1], device=x.device)
        where = torch.empty(B, sources.shape[1], dtype=torch.long, device=x.device)
        where.scatter_(1, stay, torch.arange(first, device=x.device).expand(B, -1))
        where.scatter_(1, merged, target + first)
        place[:, even::2] = where
        state = _moved(state, place)
    return x, state._replace(sizes=sizes)


def size_bias(state: TokenState, dtype: torch.dtype) -> Tensor | None:
    """ToMe's proportional attention: log size of each key, added to the logits, [B, 1, 1, N]."""
    return None if state.sizes is None else state.sizes.log()[:, None, None].to(dtype)


def _moved(state: TokenState, place: Tensor) -> TokenState:
    """Append where the input tokens are after the tokens of [B, n] moved to `place`."""
    assert state.assign is not None
    if not state.assign:
        return state._replace(assign=(place,))
    before = state.assign[-1]
    now = place.gather(1, before.clamp(min=0)).where(before >= 0, before)
    return state._replace(assign=(*state.assign, now))


REDUCTIONS: dict[str, Reduce] = {"evit": evit, "tome": tome, "random": random}
