"""Token reduction inside chosen blocks: fewer tokens after the attention, no parameters.

One interface: `reduce(x, q, k, rate, prefix, assign) -> (x, assign)`, called after the attention
residual. x: [B, P + n, D] with P prefix tokens (CLS first), q and k: [B, H, P + n, d].
assign: [B, N0] long, the token (counted without the prefix) that each input token lies in, or None.

B batch, n patch tokens, D width, H heads, d head width, k tokens kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor, Tensor, Tensor, float, int, Tensor | None], tuple[Tensor, Tensor | None]]


def kept_tokens(tokens: int, rate: float) -> int:
    """ceil(rate * tokens), safe against products such as .55 * 20 = 11.000000000000002."""
    return math.ceil(rate * tokens - 1e-6)


def rate_at(progress: float, keep_rate: float, levels: int, span: list[float]) -> float:
    """The keep rate at a stage's progress: a half cosine from 1 over `span`, in `levels` steps.

    The rate steps and not the token count, so that few shapes occur and the last is the target.
    """
    start, end = span
    share = min(max((progress - start) / max(end - start, 1e-12), 0.0), 1.0)
    level = math.floor((1 - math.cos(math.pi * share)) / 2 * levels + 1e-9)
    return 1 - (1 - keep_rate) * level / levels if level < levels else keep_rate


def cls_attention(q: Tensor, k: Tensor, prefix: int) -> Tensor:
    """The CLS token's attention to each patch token, mean over heads, fp32 or better: [B, n]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        row = q[:, :, :1].to(dtype) @ k.to(dtype).transpose(-2, -1) * q.shape[-1] ** -0.5
    return row.softmax(dim=-1)[:, :, 0, prefix:].mean(dim=1)


def evit(
    x: Tensor, q: Tensor, k: Tensor, rate: float, prefix: int, assign: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Keep the tokens the CLS attends to most and fuse the others into one (EViT, 2202.07800).

    The fused token is the sum of the others weighted by their raw attention, not renormalised; a
    later reducing block treats it like any other token.
    """
    B, n = x.shape[0], x.shape[1] - prefix
    kept = kept_tokens(n, rate)
    if kept >= n:
        return x, assign
    attention = cls_attention(q, k, prefix)
    index = attention.topk(kept, dim=1).indices  # [B, k]
    patches = x[:, prefix:]
    best = patches.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    weights = attention.scatter(1, index, 0.0).to(x.dtype)
    fused = weights[:, None] @ patches  # [B, 1, D]
    if assign is not None:
        place = torch.full((B, n), kept, dtype=torch.long, device=x.device)
        place.scatter_(1, index, torch.arange(kept, device=x.device).expand(B, -1))
        assign = place.gather(1, assign)
    return torch.cat([x[:, :prefix], best, fused.to(x.dtype)], dim=1), assign


REDUCTIONS: dict[str, Reduce] = {"evit": evit}
