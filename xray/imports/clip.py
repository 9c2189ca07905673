"""transformers' CLIPModel and MetaClip2Model: CLIP, MetaCLIP 1 and 2, DFN."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from xray.exports.names.clip import HEAD, VISION
from xray.imports.parts import (
    CLIP_VIT,
    Family,
    Imported,
    Vision,
    activation,
    complete,
    flat,
    linear_head,
    vit,
)
from xray.imports.preprocessing import of_transformers
from xray.imports.source import Source
from xray.imports.texts import clip_text, require_tokenizer
from xray.imports.transformers_folder import (
    IMAGE,
    TEXT,
    in_text,
    read_config,
    text_part,
    text_sizes,
    vision_sizes,
)
from xray.models.weight_loading import part

KINDS = ("clip", "metaclip_2")
TOWERS = (TEXT, IMAGE)


def read(source: Source, folder: Path) -> Imported:
    """Read both towers; raises ArtifactError for a part that ours cannot represent."""
    config = read_config(source)
    state = source.tensors()
    image, text = config.vision_config, config.text_config
    model = vit(
        CLIP_VIT,
        image.layer_norm_eps,
        **vision_sizes(source, image, image.intermediate_size),
        act_layer=activation(source, image.hidden_act),
    )
    found = VISION.to_ours(part(state, IMAGE))
    named = complete(source, "the image tower", found, IMAGE)
    data = of_transformers(source, named, image.image_size)
    vision = Vision(model, data, named, partial(VISION.theirs, prefix=IMAGE))
    beside = {k: v for k, v in state.items() if not k.startswith(TOWERS) and k != "logit_scale"}
    head = complete(source, "the joint space", HEAD.to_ours(beside)) | flat(state, "logit_scale")
    require_tokenizer(source, folder)
    own = text_part(state)
    # a configuration of before transformers 4.30 gives 2, and the largest token is read
    end = None if config.model_type == "clip" and text.eos_token_id == 2 else text.eos_token_id
    tower = clip_text(source, folder, text_sizes(text), own, in_text, end)
    joint = linear_head(config.projection_dim)
    return Imported("transformers", vision, tower, joint, head, HEAD.theirs)


FAMILY = Family("CLIPModel", lambda source: source.kind in KINDS, read)
