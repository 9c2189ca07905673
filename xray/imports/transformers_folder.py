"""Folders of transformers: their configs, and the sizes and tensors that families share."""

from __future__ import annotations

from typing import Any

from xray.errors import ArtifactError, ConfigError
from xray.exports.common import mlp_ratio
from xray.imports.parts import State, square
from xray.imports.source import Source
from xray.models.llm_folder import read_settings
from xray.models.weight_loading import part

TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "max_position_embeddings", "hidden_act",
              "layer_norm_eps")  # fmt: skip
TEXT, IMAGE = "text_model.", "vision_model."  # prefixes of the towers of CLIP and SigLIP


def read_config(source: Source) -> Any:
    """Read config.json as transformers does; raises ArtifactError for what it cannot read."""
    try:
        return read_settings(source.folder)
    except ConfigError as error:
        raise ArtifactError(f"{source}: {error}") from error


def vision_sizes(source: Source, config: Any, hidden: int) -> dict[str, Any]:
    """Return the sizes of a ViT by timm's names. hidden: width of its MLP."""
    return {
        "patch_size": square(source, config.patch_size),
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio(hidden, config.hidden_size),
    }


def text_sizes(config: Any) -> dict[str, Any]:
    """Return the settings of CLIP's or SigLIP's text tower that its weights depend on."""
    return {name: getattr(config, name) for name in TEXT_SIZES}


def text_part(state: State) -> State:
    """Select the text tower's tensors, without positions that older files store as numbers."""
    own = part(state, TEXT)
    return {k: v for k, v in own.items() if not k.endswith("position_ids")}


def in_text(name: str) -> str:
    """Return the full name of a text tower's tensor."""
    return f"{TEXT}{name}"
