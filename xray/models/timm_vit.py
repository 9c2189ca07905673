"""Creation of timm models, restricted to a VisionTransformer of standard blocks."""

from __future__ import annotations

from typing import Any

import timm
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer

from xray.config import ModelConfig
from xray.errors import ConfigError

REJECTED_KWARGS = ("patch_drop_rate", "in_chans", "num_classes", "drop_path_rate", "img_size")


def create_timm(config: ModelConfig, resolution: tuple[int, int]) -> VisionTransformer:
    """Create timm's model without pretrained weights; resolution is (height, width) in pixels.

    Raises ConfigError with the reason if the model cannot be the backbone.
    """
    for key in REJECTED_KWARGS:
        if key in config.kwargs:
            raise ConfigError(
                f"model.kwargs.{key} is not a setting of the backbone{_replacement(key)}"
            )
    try:
        vit = timm.create_model(
            config.name,
            num_classes=0,
            img_size=resolution,
            drop_path_rate=config.drop_path,
            **config.kwargs,
        )
    except Exception as error:  # timm raises many types of errors for a bad name or keyword
        raise ConfigError(
            f"timm cannot build model.name={config.name} with model.kwargs={config.kwargs}: {error}"
        ) from error
    reason = _unsupported(vit)
    if reason or not isinstance(vit, VisionTransformer):
        raise ConfigError(f"model.name={config.name} cannot be the backbone: {reason}")
    return vit


def _replacement(key: str) -> str:
    replacements = {"drop_path_rate": "model.drop_path", "img_size": "data.resolution"}
    return f": set {replacements[key]}" if key in replacements else ""


def _unsupported(vit: Any) -> str:
    """Return the difference from a VisionTransformer of standard blocks, or an empty string."""
    kind = type(vit)
    if kind is not VisionTransformer:  # subclasses handle tokens or positions differently
        return f"it is timm's {kind.__name__} ({kind.__module__}), not its VisionTransformer"
    if type(vit.patch_embed) is not PatchEmbed:
        return f"its stem is {type(vit.patch_embed).__name__}, not one convolution over patches"
    if vit.pos_embed is None:
        return "it has no learned position table"
    for block in vit.blocks:
        if type(block) is not Block:
            return f"its blocks are {type(block).__name__}, not timm's pre-norm Block"
        if type(block.attn) is not Attention:
            return f"its attention is {type(block.attn).__name__}, not timm's Attention"
        if getattr(block.attn, "gate", None) is not None:
            return "its attention is gated"
    return ""
