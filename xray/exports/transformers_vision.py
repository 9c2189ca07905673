"""Image towers as transformers' CLIPVisionModel, SiglipVisionModel, ViTModel and Dinov2Model.

They differ in what they have besides plain blocks. CLIP's begins with a norm and has no bias in the
patch embedding. SigLIP's has no CLS token and ends in attention pooling. DINOv2's has LayerScale,
and register tokens in Dinov2WithRegistersModel. DINOv3's has rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from xray.artifacts.encoders import VisionEncoder
from xray.exports.common import image_state, is_present
from xray.exports.names import clip, siglip, vit
from xray.exports.plain_vit import (
    State,
    activation_name,
    fill_bias,
    final_norm,
    fold_bias,
    has_plain_mlp,
    plain_state,
    renamed,
    unsupported_part,
)


@dataclass
class Tower:
    """An image tower: its settings as a config of transformers, and its weights by its names."""

    settings: dict[str, Any]  # with `model_type`
    state: State

    @property
    def kind(self) -> str:
        return str(self.settings["model_type"])


def unsupported_vision(encoder: VisionEncoder) -> str:
    """Name the part of a backbone that no ViT of transformers has, or ""."""
    vision: Any = encoder.vision
    if vision.eva:
        return _unsupported_eva(vision)
    if vision.pool == "mean":
        return "its feature is the mean of the tokens (model.pool=mean)"
    if len(set(vision.patch_size)) != 1:
        return "its patches are not square"
    if reason := unsupported_part(vision, lambda mlp: has_plain_mlp(mlp) or _is_gated(mlp)):
        return reason
    first, dinov2 = vision.blocks[0], _is_dinov2(vision)
    if dinov2 and is_present(vision.norm_pre):
        return "it has LayerScale, registers or SwiGLU, and a norm before its blocks"
    if vision.pool == "map":
        return _unsupported_pool(vision, first)
    if dinov2 and not _ratio(vision, first.mlp):
        return "its MLP ratio is not a whole number"
    return ""


def _is_gated(mlp: nn.Module) -> bool:
    """Return True for the SwiGLU of the largest DINOv2."""
    return type(mlp) is GluMlp and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last


def _is_dinov2(vision: Any) -> bool:
    """Return True for a ViT with a part that of these families only DINOv2 has."""
    first = vision.blocks[0]
    return is_present(first.ls1) or vision.reg_token is not None or _is_gated(first.mlp)


def _ratio(vision: Any, mlp: Any) -> int:
    """Return DINOv2's MLP ratio, a whole number; 0 if there is none.

    SwiGLU has two thirds of the width that it stands for, rounded up to a multiple of 8.
    """
    width, hidden = vision.embed_dim, mlp.fc2.in_features
    ratios = {ratio: ratio * width for ratio in range(1, 17)}
    if _is_gated(mlp):
        ratios = {ratio: (size * 2 // 3 + 7) // 8 * 8 for ratio, size in ratios.items()}
    return next((ratio for ratio, size in ratios.items() if size == hidden), 0)


def _unsupported_pool(vision: Any, block: Any) -> str:
    """Name the difference of a tower with attention pooling from SigLIP's, or ""."""
    pool, others = vision.attn_pool, (block.ls1, block.ls2, vision.norm_pre)
    if vision.num_prefix_tokens or any(map(is_present, others)):
        return "it has attention pooling with prefix tokens, LayerScale or a norm before its blocks"
    same = pool.mlp.fc1.out_features == block.mlp.fc1.out_features
    if pool.latent_len != 1 or pool.num_heads != block.attn.num_heads or not same:
        return "its attention pooling has other sizes than its blocks"
    if is_present(pool.q_norm) or pool.pos_embed is not None:
        return "its attention pooling has normalisation layers or positions"
    return ""


def _unsupported_eva(vision: Any) -> str:
    """Name the difference of one of timm's Eva models from DINOv3's, or ""."""
    rotary = vision.rotary
    own = rotary is not None and rotary.centred and rotary.halves and not rotary.columns_first
    if not own or rotary.offset or vision.pos_embed is not None or vision.pool != "cls":
        return "it is timm's Eva with other positions or pooling than DINOv3's"
    norms = [m for m in vision.modules() if isinstance(m, nn.LayerNorm)]
    for block in vision.blocks:
        attention, mlp = block.attn, block.mlp
        if attention.qkv is None or is_present(attention.q_norm) or is_present(attention.norm):
            return "its attention is not DINOv3's"
        gated = type(mlp) is SwiGLU and isinstance(mlp.act, nn.SiLU)
        if not gated and not (type(mlp) is Mlp and activation_name(mlp.act) == "gelu"):
            return f"its MLP is not DINOv3's ({type(mlp).__name__})"
        if is_present(mlp.norm):
            return "its MLP has a norm"
    if is_present(vision.norm_pre) or len({norm.eps for norm in norms}) != 1:
        return "its norms are not DINOv3's"
    return ""


def _dinov3(encoder: VisionEncoder, side: int) -> Tower:
    """Return DINOv3's tower, whose positions are rotary."""
    vision: Any = encoder.vision
    own = {final_norm(name): tensor for name, tensor in image_state(encoder, side).items()}
    first, width = vision.blocks[0], vision.embed_dim
    gated, biased = type(first.mlp) is SwiGLU, first.attn.q_bias is not None
    registers = own.setdefault("reg_token", torch.zeros(1, 0, width)).shape[1]
    settings = {
        "hidden_size": width,
        "num_hidden_layers": len(vision.blocks),
        "num_attention_heads": first.attn.num_heads,
        "intermediate_size": (first.mlp.fc1_g if gated else first.mlp.fc1).out_features,
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "layer_norm_eps": first.norm1.eps,
        "image_size": side,
        "patch_size": vision.patch_size[0],
        "rope_theta": vision.rotary.temperature,
        "num_register_tokens": registers,
        "query_bias": biased,
        "value_bias": biased,
    }
    for number in range(len(vision.blocks)):
        for scale in ("gamma_1", "gamma_2"):
            own.setdefault(f"blocks.{number}.{scale}", torch.ones(width))
    state = renamed(vit.DINOV3_GATED if gated else vit.DINOV3, own)
    state["embeddings.mask_token"] = torch.zeros(1, 1, width)
    return Tower({"model_type": "dinov3_vit", **settings}, state)


def image_tower(encoder: VisionEncoder, side: int) -> Tower:
    """Return the tower for images of `side` pixels; `unsupported_vision` has found nothing."""
    if encoder.vision.eva:
        return _dinov3(encoder, side)
    vision, own = encoder.vision, plain_state(encoder, side)
    blocks: Any = vision.blocks
    first, width = blocks[0], vision.embed_dim
    settings: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.attn.num_heads,
        "intermediate_size": first.mlp.fc1.out_features,
        "hidden_act": activation_name(first.mlp.act),
        "layer_norm_eps": first.norm1.eps,
        "image_size": side,
        "patch_size": vision.patch_size[0],
        "qkv_bias": first.attn.qkv.bias is not None,
    }
    if is_present(vision.norm_pre) or vision.pool == "map":
        del settings["qkv_bias"]
        for number in range(len(blocks)):
            fill_bias(own, f"blocks.{number}.attn.qkv")
    if is_present(vision.norm_pre):
        fold_bias(own)
        return Tower({"model_type": "clip_vision_model", **settings}, renamed(clip.VISION, own))
    fill_bias(own, "patch_embed.proj")
    if vision.pool == "map":
        for layer in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2"):
            fill_bias(own, f"attn_pool.{layer}")
        return Tower({"model_type": "siglip_vision_model", **settings}, renamed(siglip.VISION, own))
    if not _is_dinov2(vision):
        return Tower({"model_type": "vit", **settings}, renamed(vit.VIT, own))
    del settings["intermediate_size"]
    settings["mlp_ratio"] = _ratio(vision, first.mlp)
    kind = "dinov2"
    if vision.reg_token is not None:
        kind, settings["num_register_tokens"] = "dinov2_with_registers", vision.reg_token.shape[1]
    for number in range(len(blocks)):
        for scale in ("ls1", "ls2"):
            own.setdefault(f"blocks.{number}.{scale}.gamma", torch.ones(width))
    state = renamed(vit.DINOV2, own) | {"embeddings.mask_token": torch.zeros(1, width)}
    if _is_gated(first.mlp):
        settings |= {"use_swiglu_ffn": True, "hidden_act": "gelu"}  # it has no other name for SiLU
        gated = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
        for old, new in gated.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return Tower({"model_type": kind, **settings}, state)


def add_pooler(tower: Tower, projection: Tensor | None, bias: Tensor | None = None) -> None:
    """Give a ViTModel a pooler that returns the CLS feature [D], or its projection [E].

    transformers' own is followed by tanh, which released ViTs do not use.
    """
    width = tower.settings["hidden_size"]
    weight = torch.eye(width) if projection is None else projection
    tower.settings |= {"pooler_act": "linear", "pooler_output_size": len(weight)}
    bias = torch.zeros(len(weight)) if bias is None else bias
    tower.state |= {"pooler.dense.weight": weight, "pooler.dense.bias": bias}
