"""Weights of a plain ViT, brought to the form that libraries with fewer options have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xray.artifacts.encoders import VisionEncoder
from xray.exports.common import image_state
from xray.exports.names.table import Names

State = dict[str, Tensor]


def plain_state(encoder: VisionEncoder, side: int) -> State:
    """Return the weights for images of `side` pixels by timm's names.

    The last norm is called `norm`, the position table has a row for CLS and none for registers, and
    all linear layers of the blocks have a bias but the one of queries, keys and values.
    """
    own = {final_norm(k): tensor for k, tensor in image_state(encoder, side).items()}
    if own.get("cls_token") is not None:
        own["pos_embed"] = _positions(encoder, own)
    blocks: Any = encoder.vision.blocks
    for number in range(len(blocks)):
        for layer in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            fill_bias(own, f"blocks.{number}.{layer}")
    return own


def fill_bias(own: State, layer: str) -> None:
    """Give a layer without a bias one of zeros."""
    own.setdefault(f"{layer}.bias", torch.zeros(len(own[f"{layer}.weight"])))


def fold_bias(own: State) -> None:
    """Add the bias of the patch embedding to the positions of the patches, as CLIP has none."""
    bias = own.pop("patch_embed.proj.bias", None)
    if bias is not None:
        places = own["pos_embed"]
        own["pos_embed"] = torch.cat([places[:, :1], places[:, 1:] + bias], dim=1)


def renamed(names: Names, own: State) -> State:
    """Rename all weights; the caller has refused models with parts that the table lacks."""
    found = names.to_theirs(own)
    assert not found.unknown, found.unknown
    return found.state


def final_norm(name: str) -> str:
    """Return the name of the last norm, which timm calls fc_norm in models that average tokens."""
    return name.removeprefix("fc_") if name.startswith("fc_norm.") else name


def _positions(encoder: VisionEncoder, own: State) -> Tensor:
    """Return positions [1, 1 + N, D] of CLS and patches; those of registers are added to them."""
    vision, table = encoder.vision, own["pos_embed"]
    rows, patches = table[:, : vision.position_prefix], table[:, vision.position_prefix :]
    if not vision.position_prefix:
        rows = table.new_zeros(1, 1, table.shape[2])
    if "reg_token" in own and rows.shape[1] > 1:
        own["reg_token"] = own["reg_token"] + rows[:, 1:]
    return torch.cat([rows[:, :1], patches], dim=1)
