"""Creation of timm models, restricted to VisionTransformer and Eva with pre-norm blocks.

Without pretrained weights they are initialised as in MAE (2111.06377)."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import (
    Attention,
    AttentionRope,
    PatchEmbed,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from xray.config import ModelConfig
from xray.errors import ConfigError, nearest
from xray.models.drop_path import replace_drop_path

# Keywords of timm, and the xray key that replaces them.
REJECTED_KWARGS = {
    "patch_drop_rate": "",
    "in_chans": "",
    "num_classes": "",
    "drop_path_rate": "model.drop_path",
    "img_size": "data.resolution",
}
MODULES = ("vision_transformer", "eva")  # of timm, which define the classes that can be used
GLOBAL_POOL = {"map": "map", "mean": "avg"}  # timm's name of a `model.pool` other than cls


def create_timm(config: ModelConfig, resolution: tuple[int, int]) -> VisionTransformer | Eva:
    """Create timm's model without loading weights; resolution is (height, width) in pixels.

    Raises ConfigError with the reason if the model cannot be the backbone.
    """
    for key, instead in REJECTED_KWARGS.items():
        if key in config.kwargs:
            hint = f": set {instead}" if instead else ""
            raise ConfigError(f"model.kwargs.{key} is not a setting of the backbone{hint}")
    if ":" not in config.name and not timm.is_model(config.name):
        names = [name for module in MODULES for name in timm.list_models(module=module)]
        hint = nearest(config.name, names)
        raise ConfigError(f"model.name={config.name} is not a model of timm{hint}")
    try:
        vit = timm.create_model(
            config.name,
            num_classes=0,
            img_size=resolution,
            drop_path_rate=config.drop_path,
            **timm_kwargs(config),
        )
    except Exception as error:  # timm raises many types of errors for a bad name or keyword
        raise ConfigError(
            f"timm cannot build model.name={config.name} with model.kwargs={config.kwargs}: {error}"
        ) from error
    reason = _unsupported(vit)
    if reason or not isinstance(vit, VisionTransformer | Eva):
        raise ConfigError(f"model.name={config.name} cannot be the backbone: {reason}")
    if config.norm_eps is not None:
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.norm_eps
    if config.drop_path:
        replace_drop_path(vit)
    if not config.pretrained:
        if "weight_init" not in config.kwargs:
            _start_weights(vit)
        if vit.pos_embed is not None:
            _start_positions(vit, config.rows_first)
    return vit


def timm_kwargs(config: ModelConfig) -> dict[str, Any]:
    """Return the keywords of the timm model, with its pooling.

    Raises ConfigError if `model.kwargs.global_pool` contradicts `model.pool`.
    """
    if config.pool == "cls":
        return config.kwargs
    pool = GLOBAL_POOL[config.pool]
    given = config.kwargs.get("global_pool", pool)
    if given != pool:
        raise ConfigError(
            f"model.kwargs.global_pool={given} contradicts model.pool={config.pool}: leave it out"
        )
    return {**config.kwargs, "global_pool": pool}


def pools_prefix(vit: VisionTransformer | Eva) -> bool:
    """Check if the pooling also reads the prefix tokens; Eva's attention pooling does."""
    if isinstance(vit, Eva):
        return vit.attn_pool is not None
    return vit.pool_include_prefix


def _unsupported(vit: Any) -> str:
    """Return the difference from a model of standard blocks, or an empty string."""
    kind = type(vit)
    if kind not in (VisionTransformer, Eva):  # subclasses handle tokens or positions differently
        return f"it is timm's {kind.__name__} ({kind.__module__}), not its VisionTransformer or Eva"
    if type(vit.patch_embed) is not PatchEmbed:
        return f"its stem is {type(vit.patch_embed).__name__}, not one convolution over patches"
    rope = getattr(vit, "rope", None)
    if rope is not None and type(rope) not in (RotaryEmbeddingCat, RotaryEmbeddingDinoV3):
        return f"its rotary positions are {type(rope).__name__}, not the same in all blocks"
    if getattr(rope, "aug_active", False):
        return "it changes its rotary positions at random in training (model.kwargs.rope_*_coords)"
    if vit.pos_embed is None and rope is None:
        return "it has no positions"
    for block in vit.blocks:
        if type(block) not in (Block, EvaBlock):
            return f"its blocks are {type(block).__name__}, not timm's pre-norm Block or EvaBlock"
        if type(block.attn) not in (Attention, EvaAttention, AttentionRope):
            return f"its attention is {type(block.attn).__name__}, not timm's Attention"
        if getattr(block.attn, "gate", None) is not None:
            return "its attention is gated"
        if getattr(block.attn, "num_kv_groups", 1) > 1:
            return "its heads share keys and values (num_kv_heads)"
    return ""


@torch.no_grad()
def _start_weights(vit: VisionTransformer | Eva) -> None:
    """Initialise linear layers and the stem as Xavier does; timm's 0.02 suits widths of 1000."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    patches: Any = vit.patch_embed.proj.weight  # a linear map of each patch's pixels
    nn.init.xavier_uniform_(patches.flatten(1))


@torch.no_grad()
def _start_positions(vit: VisionTransformer | Eva, rows_first: bool) -> None:
    """Initialise the position table with sine-cosine embeddings of the patch positions.

    timm initialises it with noise, from which a short run must first learn the positions. Raises
    ConfigError if the width is not a multiple of 4.
    """
    if vit.embed_dim % 4:
        raise ConfigError(
            f"model.kwargs.embed_dim={vit.embed_dim} must be a multiple of 4: the position "
            "embedding has a sine and a cosine for rows and for columns"
        )
    table: Any = vit.pos_embed  # never None: create_timm rejects such a model
    grid = (1, *vit.patch_embed.grid_size)
    positions = sincos_positions(grid, vit.embed_dim, table.device, rows_first)
    table[:, -len(positions) :] = positions  # rows of prefix tokens, if any, come first


def sincos(positions: Tensor, width: int) -> Tensor:
    """Embed positions, [N] -> [N, width]: sines, then cosines."""
    rates = torch.arange(width // 2, dtype=torch.float32, device=positions.device)
    rates = 10000 ** (-rates / (width / 2))
    angles = positions[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_positions(
    grid: tuple[int, int, int],
    width: int,
    device: torch.device | None = None,
    rows_first: bool = False,
) -> Tensor:
    """Embed the positions of a grid (t, h, w), [t*h*w, width]; width is a multiple of 4.

    The first half of the channels encodes columns and the second rows, as in MAE's code; with
    `rows_first` the other way round. A time embedding, zero in the first slot, is added to all
    channels: an image equals a clip's first slot.
    """
    t, h, w = grid
    ticks = torch.arange(max(grid), device=device)
    rows = sincos(ticks[:h], width // 2).repeat_interleave(w, dim=0)
    columns = sincos(ticks[:w], width // 2).repeat(h, 1)
    time = sincos(ticks[:t], width) - sincos(ticks[:1], width)
    halves = [rows, columns] if rows_first else [columns, rows]
    return (torch.cat(halves, dim=1)[None] + time[:, None]).flatten(0, 1)
