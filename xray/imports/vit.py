"""transformers' ViTModel, ViTMAEModel, and Dinov2Model, also with registers, as backbones."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from xray.config import ModelConfig
from xray.exports.names.vit import DINOV2, VIT
from xray.imports.parts import (
    DINOV2_GIANT,
    PLAIN_VIT,
    STEM,
    Family,
    Imported,
    State,
    Vision,
    activation,
    complete,
    vit,
)
from xray.imports.preprocessing import of_transformers
from xray.imports.source import Source
from xray.imports.transformers_folder import read_config, vision_sizes

log = logging.getLogger("xray")
# Prefix of a model with a head, and its table, by model_type.
KINDS = {
    "vit": ("vit.", VIT),
    "vit_mae": ("vit.", VIT),
    "dinov2": ("dinov2.", DINOV2),
    "dinov2_with_registers": ("dinov2_with_registers.", DINOV2),
}
# Position tables that transformers resizes, which are larger than those of the processor's crops.
RESIZES: dict[str, Any] = {"dinov2": "plain", "dinov2_with_registers": "antialias"}


def read(source: Source, folder: Path) -> Imported:
    """Read the backbone; heads, poolers and mask tokens are left out."""
    config = read_config(source)
    prefix, table = KINDS[config.model_type]
    dinov2 = table is DINOV2
    gated = getattr(config, "use_swiglu_ffn", False)
    hidden = int(config.hidden_size * config.mlp_ratio) if dinov2 else config.intermediate_size
    if gated:  # gate and value in one matrix, as in timm
        hidden = 2 * ((hidden * 2 // 3 + 7) // 8 * 8)
    sizes = {
        **vision_sizes(source, config, hidden),
        "init_values": 1e-5 if dinov2 else None,  # replaced by the weights
        "qkv_bias": config.qkv_bias,
        "reg_tokens": getattr(config, "num_register_tokens", 0),
    }
    if not gated:
        sizes["act_layer"] = activation(source, config.hidden_act)
    model = vit(DINOV2_GIANT if gated else PLAIN_VIT, config.layer_norm_eps, **sizes)
    tensors = source.tensors()
    prefix = prefix if any(name.startswith(prefix) for name in tensors) else ""
    plain = {k.removeprefix(prefix): v for k, v in tensors.items()}
    state = complete(source, "the backbone", table.to_ours(plain), prefix)
    theirs = partial(table.theirs, prefix=prefix)
    _positions_of_registers(state)
    data = of_transformers(source, state, None if dinov2 else config.image_size)
    if dinov2:
        model.resize_positions = RESIZES[config.model_type]
        _resize_positions(source, model, state, data.resolution)
    return Imported("transformers", Vision(model, data, state, theirs))


def _positions_of_registers(state: State) -> None:
    """Give the register tokens, which have no positions, rows of zeros after that of CLS."""
    registers, table = state.get("reg_token"), state.get("pos_embed")
    if registers is not None and table is not None:
        rows = F.pad(table[:, :1], (0, 0, 0, registers.shape[1]))
        state["pos_embed"] = rows.new_empty(1, rows.shape[1] + table.shape[1] - 1, rows.shape[2])
        state["pos_embed"][:, : rows.shape[1]] = rows
        state["pos_embed"][:, rows.shape[1] :] = table[:, 1:]


def _resize_positions(source: Source, model: ModelConfig, state: State, side: int) -> None:
    """Resize the position table to pictures of `side` pixels, as transformers does."""
    table, grid = state["pos_embed"], side // state[STEM].shape[-1]
    prefix = 1 + model.kwargs.get("reg_tokens", 0)
    if table.shape[1] == prefix + grid**2:
        return
    state["pos_embed"] = resample_abs_pos_embed(
        table,
        new_size=[grid, grid],
        num_prefix_tokens=prefix,
        antialias=model.resize_positions == "antialias",
    )
    log.info("%s: position embedding resized to pictures of %d pixels", source, side)


FAMILY = Family("ViTModel", lambda source: source.kind in KINDS, read)
