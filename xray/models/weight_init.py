"""Initialisation of a backbone without pretrained weights, as in MAE (2111.06377)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from xray.errors import ConfigError
from xray.models.position_embedding import sincos_positions


@torch.no_grad()
def start_weights(vit: VisionTransformer) -> None:
    """Initialise linear layers and the stem with Xavier-uniform weights.

    Their standard deviation depends on the width; timm's 0.02 suits widths of 1000 and more.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    patches: Any = vit.patch_embed.proj.weight  # a linear map of each patch's pixels
    nn.init.xavier_uniform_(patches.flatten(1))


@torch.no_grad()
def start_positions(vit: VisionTransformer) -> None:
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
    positions = sincos_positions((1, *vit.patch_embed.grid_size), vit.embed_dim, table.device)
    table[:, -len(positions) :] = positions  # rows of prefix tokens, if any, come first
