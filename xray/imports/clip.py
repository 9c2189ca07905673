"""transformers' CLIPModel and MetaClip2Model: CLIP, MetaCLIP 1 and 2, DFN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xray.errors import ArtifactError, brief
from xray.exports.common import mlp_ratio
from xray.exports.names.clip import HEAD, VISION
from xray.imports.parts import (
    CLIP_VIT,
    Family,
    Imported,
    State,
    Vision,
    activation,
    below,
    complete,
    flat,
    linear_head,
    side_of,
    square,
    vit,
)
from xray.imports.preprocessing import of_transformers
from xray.imports.source import Source
from xray.imports.texts import clip_text, copy_tokenizer

KINDS = ("clip", "metaclip_2")
TOWERS = ("text_model.", "vision_model.")
TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "max_position_embeddings", "hidden_act",
              "layer_norm_eps")  # fmt: skip


def read(source: Source, folder: Path) -> Imported:
    """Read both towers; raises ArtifactError for a part that ours cannot represent."""
    config = settings(source)
    state = source.tensors()
    image, text = config.vision_config, config.text_config
    model = vit(
        CLIP_VIT,
        image.layer_norm_eps,
        patch_size=square(source, image.patch_size),
        embed_dim=image.hidden_size,
        depth=image.num_hidden_layers,
        num_heads=image.num_attention_heads,
        mlp_ratio=mlp_ratio(image.intermediate_size, image.hidden_size),
        act_layer=activation(source, image.hidden_act),
    )
    named = complete(source, "the image tower", VISION.to_ours(below(state, "vision_model.")))
    vision = Vision(model, of_transformers(source, side_of(source, image.image_size, named)), named)
    beside = {k: v for k, v in state.items() if not k.startswith(TOWERS) and k != "logit_scale"}
    head = complete(source, "the joint space", HEAD.to_ours(beside)) | flat(state, "logit_scale")
    if not copy_tokenizer(source, folder):
        raise ArtifactError(f"{source} has no tokenizer: put its files into the folder")
    sizes = {name: getattr(text, name) for name in TEXT_SIZES}
    own = text_part(state)
    # a configuration of before transformers 4.30 gives 2, and the largest token is read
    end = None if config.model_type == "clip" and text.eos_token_id == 2 else text.eos_token_id
    tower = clip_text(source, folder, sizes, own, end)
    return Imported("transformers", vision, tower, linear_head(config.projection_dim), head)


def settings(source: Source) -> Any:
    """Read config.json as transformers does; raises ArtifactError for what it cannot read."""
    from transformers import AutoConfig

    from xray.models.llm_folder import NO_REMOTE_CODE, quiet_transformers

    quiet_transformers()
    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True, **NO_REMOTE_CODE)
    except Exception as error:  # transformers raises many kinds
        raise ArtifactError(
            f"transformers cannot read {source}/config.json: {brief(error)}"
        ) from error


def text_part(state: State) -> State:
    """Select the text tower's tensors, without positions that older files store as numbers."""
    own = below(state, "text_model.")
    return {k: v for k, v in own.items() if not k.endswith("position_ids")}


FAMILY = Family("CLIPModel", lambda source: source.kind in KINDS, read)
