"""transformers' ViTModel, ViTMAEModel, and Dinov2Model, also with registers, as backbones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch.nn.functional as F

from xray.exports.names.vit import DINOV2, VIT
from xray.imports.parts import (
    DINOV2_GIANT,
    PLAIN_VIT,
    Family,
    Imported,
    State,
    Vision,
    activation,
    complete,
    side_of,
    vit,
)
from xray.imports.preprocessing import of_transformers
from xray.imports.source import Source
from xray.imports.transformers_folder import read_config, vision_sizes

# Prefix of a model with a head, and its table, by model_type.
KINDS = {
    "vit": ("vit.", VIT),
    "vit_mae": ("vit.", VIT),
    "dinov2": ("dinov2.", DINOV2),
    "dinov2_with_registers": ("dinov2_with_registers.", DINOV2),
}


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
    side = side_of(source, config.image_size, state)
    return Imported("transformers", Vision(model, of_transformers(source, side), state, theirs))


def _positions_of_registers(state: State) -> None:
    """Give the register tokens, which have no positions, rows of zeros after that of CLS."""
    registers, table = state.get("reg_token"), state.get("pos_embed")
    if registers is not None and table is not None:
        rows = F.pad(table[:, :1], (0, 0, 0, registers.shape[1]))
        state["pos_embed"] = rows.new_empty(1, rows.shape[1] + table.shape[1] - 1, rows.shape[2])
        state["pos_embed"][:, : rows.shape[1]] = rows
        state["pos_embed"][:, rows.shape[1] :] = table[:, 1:]


FAMILY = Family("ViTModel", lambda source: source.kind in KINDS, read)
