"""What a backbone starts with before any training: MAE's weights and positions (2111.06377)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from xray.errors import ConfigError
from xray.models.position_embedding import sincos_positions


@torch.no_grad()
def start_weights(vit: VisionTransformer) -> None:
    """Xavier weights, whose spread follows the width: timm's .02 suits a thousand and more."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    patches: Any = vit.patch_embed.proj.weight  # a linear map of each patch's pixels
    nn.init.xavier_uniform_(patches.flatten(1))


@torch.no_grad()
def start_positions(vit: VisionTransformer) -> None:
    """Sines and cosines of where patches lie: from timm's start, which is noise, a short run has
    to learn that first.

    Raises ConfigError for a width that they cannot fill.
    """
    if vit.embed_dim % 4:
        raise ConfigError(
            f"model.kwargs.embed_dim={vit.embed_dim} must be a multiple of 4: rows and "
            "columns have a sine and a cosine each"
        )
    table: Any = vit.pos_embed  # never None: create_timm refuses such a model
    places = sincos_positions((1, *vit.patch_embed.grid_size), vit.embed_dim, table.device)
    table[:, -len(places) :] = places  # prefix tokens, where it has them, come before
