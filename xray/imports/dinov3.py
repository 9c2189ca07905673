"""transformers' DINOv3ViTModel as a backbone: rotary positions, registers, and SwiGLU in some."""

from __future__ import annotations

from pathlib import Path

from xray.errors import ArtifactError
from xray.exports.names.vit import DINOV3, DINOV3_GATED
from xray.imports.parts import DINOV3_VIT, Family, Imported, Vision, complete, vit
from xray.imports.preprocessing import of_transformers
from xray.imports.source import Source
from xray.imports.transformers_folder import read_config, vision_sizes

ALIGNED = 8  # the width of SwiGLU's MLP is a multiple of it
# Biases of released models; timm's EvaAttention has one for queries and values only.
BIASES = {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True,
          "mlp_bias": True}  # fmt: skip


def read(source: Source, folder: Path) -> Imported:
    """Read the backbone; the mask token is left out."""
    config = read_config(source)
    for name, usual in BIASES.items():
        if getattr(config, name) != usual:
            raise ArtifactError(f"{source}: {name}={getattr(config, name)} is not supported")
    gated, hidden = config.use_gated_mlp, config.intermediate_size
    if config.hidden_act != ("silu" if gated else "gelu") or (gated and hidden % ALIGNED):
        raise ArtifactError(
            f"{source}: an MLP of {hidden} with {config.hidden_act} is not one of DINOv3's"
        )
    model = vit(
        DINOV3_VIT,
        config.layer_norm_eps,
        **vision_sizes(source, config, hidden),
        num_reg_tokens=config.num_register_tokens,
        rope_temperature=config.rope_theta,
        swiglu_mlp=gated,
        swiglu_align_to=ALIGNED if gated else 0,
    )
    named = {k: v for k, v in source.tensors().items() if v.numel()}  # there may be no registers
    table = DINOV3_GATED if gated else DINOV3
    state = complete(source, "the backbone", table.to_ours(named))
    data = of_transformers(source, state)
    return Imported("transformers", Vision(model, data, state, table.theirs))


FAMILY = Family("DINOv3ViTModel", lambda source: source.kind == "dinov3_vit", read)
