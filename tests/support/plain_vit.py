"""Reference implementation of token reduction: explicit attention, one sample at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from xray.models import VisionBackbone


def explicit_attention(attn: torch.nn.Module, y: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Compute attention: returns output [N, D], weights [H, N, N] and keys [H, N, d].

    bias: [N], added to the logits.
    """
    N, D = y.shape
    q, k, v = attn.qkv(y).reshape(N, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return attn.proj((weights @ v).transpose(0, 1).reshape(N, D)), weights, k


def plain_head(ours: VisionBackbone, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the pooling head of x [N, D]: feature [D], attention to each token [H, N].

    bias: [N], added to the logits.
    """
    pool = ours.attn_pool
    assert pool is not None
    N, D = x.shape
    q = pool.q(pool.latent[0]).reshape(1, pool.num_heads, -1).transpose(0, 1)
    k, v = pool.kv(x).reshape(N, 2, pool.num_heads, -1).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    out = pool.proj((weights @ v).transpose(0, 1).reshape(D))
    return out + pool.mlp(pool.norm(out)), weights[:, 0]


def plain_pool(ours: VisionBackbone, x: Tensor, sizes: Tensor) -> Tensor:
    """Pool the tokens [N, D] of the last block, of these sizes [N], into a feature [D]."""
    x = ours.norm(x)
    if ours.pool == "cls":
        return x[0]
    P = ours.num_prefix_tokens
    if ours.pool == "map":
        return plain_head(ours, x[P:], sizes[P:].log())[0]
    return ours.fc_norm((sizes[P:, None] * x[P:]).sum(0) / sizes[P:].sum())


def plain_scores(ours: VisionBackbone, x: Tensor, weights: Tensor) -> Tensor:
    """Score the patch tokens, [n], after an attention of these weights [H, N, N]."""
    P = ours.num_prefix_tokens
    if ours.pool == "cls":
        return weights[:, 0, P:].mean(0)
    if ours.pool == "map":
        return plain_head(ours, ours.norm(x)[P:], x.new_zeros(()))[1].mean(0).detach()
    return weights[:, P:, P:].mean((0, 1)).detach()


def plain_evit(ours: VisionBackbone, pixels: Tensor, rates: list[float], fuse: bool) -> Tensor:
    """Compute pooled features [B, D] with EViT reduction (2202.07800)."""
    rows = []
    P = ours.num_prefix_tokens
    for x in ours.embed(pixels):
        rate_at = dict(zip(ours.reduce_at, rates, strict=True))
        for number, block in enumerate(ours.blocks):
            out, weights, _ = explicit_attention(block.attn, block.norm1(x), x.new_zeros(()))
            x = x + out
            if number in rate_at:
                score = plain_scores(ours, x, weights)
                n = len(score)
                keep = torch.zeros(n, dtype=torch.bool)
                keep[score.argsort(descending=True)[: math.ceil(rate_at[number] * n - 1e-6)]] = True
                fused = (score[~keep, None] * x[P:][~keep]).sum(0, keepdim=True)
                x = torch.cat([x[:P], x[P:][keep], fused[: int(fuse)]])
            x = x + block.mlp(block.norm2(x))
        rows.append(plain_pool(ours, x, x.new_ones(len(x))))
    return torch.stack(rows)


def plain_tome(
    ours: VisionBackbone, pixels: Tensor, rate: float, proportional: bool = True
) -> Tensor:
    """Compute pooled features [B, D] with ToMe reduction (2210.09461), merging pair by pair."""
    rows = []
    P = ours.num_prefix_tokens
    for x in ours.embed(pixels):
        sizes = torch.ones(len(x), dtype=x.dtype)
        for number, block in enumerate(ours.blocks):
            bias = sizes.log() if proportional else torch.zeros_like(sizes)
            out, _, k = explicit_attention(block.attn, block.norm1(x), bias)
            x = x + out
            if number in ours.reduce_at:
                x, sizes, _ = merge(x, sizes, k.mean(0), P, rate)
            x = x + block.mlp(block.norm2(x))
        rows.append(plain_pool(ours, x, sizes))
    return torch.stack(rows)


def merge(
    x: Tensor, sizes: Tensor, keys: Tensor, prefix: int, rate: float
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Merge the most similar pairs of even and odd tokens: returns (tokens, sizes, groups).

    A group lists the tokens that a new token is made of, beginning with the one at an odd place.
    """
    n = len(x) - prefix
    merges = n - (math.ceil(rate * n - 1e-6) + 1)
    unit = keys / keys.norm(dim=-1, keepdim=True)
    sources = [i for i in range(prefix, len(x)) if i % 2 == 0]
    targets = [i for i in range(prefix, len(x)) if i % 2 == 1]
    pairs = []
    for i in sources:
        cosines = [(unit[i] @ unit[j]).item() for j in targets]
        best = max(range(len(targets)), key=lambda j: cosines[j])
        pairs.append((cosines[best], i, targets[best]))
    chosen = {i: j for _, i, j in sorted(pairs, reverse=True)[:merges]}
    tokens, counts, groups = [], [], []
    for token in [*range(prefix), *(i for i in sources if i not in chosen), *targets]:
        group = [token, *(i for i, j in chosen.items() if j == token)]
        total = sizes[group].sum()
        tokens.append((x[group] * sizes[group, None]).sum(0) / total)
        counts.append(total)
        groups.append(group)
    return torch.stack(tokens), torch.stack(counts), groups


def mae_table(side: int, width: int) -> np.ndarray:
    """Return MAE's table [side * side, D] of a square grid in float64 (2111.06377, its code).

    Its code passes the columns first to the mesh grid, so the half that it calls `emb_h` has them.
    """
    rates = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    across, down = np.tile(np.arange(side), side), np.repeat(np.arange(side), side)
    angles = [np.outer(places, rates) for places in (across, down)]
    return np.hstack([f(angle) for angle in angles for f in (np.sin, np.cos)])
