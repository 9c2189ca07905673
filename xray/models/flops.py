"""Multiply-accumulate operations (MACs) of a forward pass, counted from the modules.

1 MAC = 2 FLOPs. Counted are the stem, linear layers, attention, token reduction and the pooling
head; as in published tables, not norms, activations and additions. A training step costs about
three forward passes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from xray.models.backbone import VisionBackbone
from xray.models.mae_decoder import MaeDecoder
from xray.models.token_reduction import KeepRate


def vision_macs(
    backbone: VisionBackbone,
    frames: int = 1,
    resolution: int | tuple[int, int] = 224,
    keep_rate: KeepRate = 1.0,
    visible: int | None = None,
) -> int:
    """Return the MACs of encoding one image (frames = 1) or clip.

    resolution: side or (height, width), in pixels. visible: number of patch tokens that a masked
    encoder reads; None for all.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    p, r = backbone.patch_size
    slots, h, w = backbone.geometry.grid(frames, height, width)
    passes = slots if backbone.video == "frames" else 1
    image = backbone.video == "frames" or frames == 1
    tokens = slots * h * w // passes
    depth = 1 if image else backbone.tubelet  # an image uses the kernels summed over time
    n = tokens if visible is None else visible // passes
    total = n * backbone.embed_dim * 3 * p * r * depth
    counts = backbone.token_counts(n, keep_rate)
    for block, after in zip(backbone.blocks, counts, strict=True):
        total += _block_macs(backbone, block, n, after)
        n = after
    return passes * (total + _pool_macs(backbone, n))


def _block_macs(backbone: VisionBackbone, block: Any, n: int, after: int) -> int:
    """Return the MACs of a block with n patch tokens before it and `after` tokens after it."""
    attn, P = block.attn, backbone.num_prefix_tokens
    width = attn.num_heads * attn.head_dim
    N = P + n
    total = N * linear_macs(attn) + 2 * N * N * width + (P + after) * linear_macs(block.mlp)
    if after < n and backbone.reduction == "tome":
        pairs = (n + P % 2) // 2
        total += pairs * (n - pairs) * attn.head_dim
    elif after < n:
        total += _score_macs(backbone, N, width) + n * backbone.embed_dim * backbone.fuse
    return total


def _score_macs(backbone: VisionBackbone, tokens: int, width: int) -> int:
    """Return the MACs of scoring the patch tokens among all tokens, by an attention's width.

    The pooling head's query times its key weights is left out: it is computed once per batch.
    """
    if backbone.attn_pool is not None:
        return (tokens - backbone.pooled_from) * backbone.attn_pool.num_heads * backbone.embed_dim
    queries = tokens - backbone.num_prefix_tokens if backbone.pool == "mean" else 1
    return queries * tokens * width


def _pool_macs(backbone: VisionBackbone, n: int) -> int:
    """Return the MACs of the pooling head over n patch tokens, 0 if there is none."""
    head = backbone.attn_pool
    if head is None:
        return 0
    keys = linear_macs(head.kv)
    read = backbone.num_prefix_tokens - backbone.pooled_from + n
    return read * keys + linear_macs(head) - keys + 2 * read * backbone.embed_dim


def decoder_macs(decoder: MaeDecoder, tokens: int, visible: int) -> int:
    """Return the MACs of the MAE decoder for `tokens` patches, `visible` of them encoded.

    The others are predicted.
    """
    total = (visible + 1) * linear_macs(decoder.embed)
    total += (tokens - visible) * linear_macs(decoder.predict)
    N = tokens + 1
    blocks: Any = decoder.blocks
    for block in blocks:
        attn = block.attn
        total += N * linear_macs(block) + 2 * N * N * attn.num_heads * attn.head_dim
    return total


def linear_macs(module: nn.Module, trained: bool = False) -> int:
    """Return the MACs per token of a module's linear layers; `trained`: only of trained ones."""
    layers: list[Any] = [m for m in module.modules() if isinstance(m, nn.Linear) or _is_conv1d(m)]
    # use the layers' feature sizes: weights that ZeRO 3 has partitioned have no elements
    return sum(
        m.nx * m.nf if _is_conv1d(m) else m.in_features * m.out_features
        for m in layers
        if m.weight.requires_grad or not trained
    )


def _is_conv1d(layer: nn.Module) -> bool:
    """Return True for the linear layers of GPT-2, which transformers names a convolution."""
    return type(layer).__name__ == "Conv1D"  # the import of transformers is slow
