"""Weights of a plain ViT, brought to the form that libraries with fewer options have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import GELUTanh, Mlp, QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from xray.artifacts.encoders import VisionEncoder
from xray.exports.common import image_state, is_present
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


def activation_name(act: nn.Module) -> str:
    """Return transformers' name of an MLP's activation, "" for one that no plain ViT has."""
    if isinstance(act, QuickGELU):
        return "quick_gelu"
    if isinstance(act, GELUTanh) or (isinstance(act, nn.GELU) and act.approximate == "tanh"):
        return "gelu_pytorch_tanh"
    return "gelu" if isinstance(act, nn.GELU) else ""


def has_plain_mlp(mlp: Any) -> bool:
    """Check if an MLP is two linear layers with a kind of GELU between them."""
    return type(mlp) is Mlp and bool(activation_name(mlp.act))


def unsupported_part(vision: Any, accepts: Callable[[Any], bool]) -> str:
    """Name the part of one of timm's ViTs that a plain ViT lacks, or "".

    accepts: tells if the other library has an MLP.
    """
    if is_present(vision.patch_embed.norm):
        return "its patch embedding ends in a norm"
    norms = [m for m in vision.modules() if isinstance(m, nn.LayerNorm)]
    if len({norm.eps for norm in norms}) != 1:
        return "its norms have more than one epsilon"
    for block in vision.blocks:
        if type(block) is not Block:
            return f"its blocks are timm's {type(block).__name__}"
        attention: Any = block.attn
        mlp: Any = block.mlp
        if is_present(attention.q_norm) or is_present(attention.norm):
            return "its attention has normalisation layers"
        if not accepts(mlp) or is_present(mlp.norm):
            return f"its MLP is not two linear layers with GELU or QuickGELU ({type(mlp).__name__})"
        if not all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)):
            return "its blocks have other norms than LayerNorm"
    return ""


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
