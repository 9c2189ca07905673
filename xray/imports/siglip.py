"""transformers' SiglipModel (SigLIP, SigLIP 2) and Siglip2Model at its fixed resolution."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

from xray.errors import ArtifactError
from xray.exports.names.siglip import HEAD, VISION, VISION_2
from xray.imports.parts import (
    SIGLIP_VIT,
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
from xray.imports.texts import require_tokenizer, siglip_text
from xray.imports.transformers_folder import (
    IMAGE,
    in_text,
    read_config,
    text_part,
    text_sizes,
    vision_sizes,
)
from xray.models.weight_loading import part

KINDS = ("siglip", "siglip2")
SCALARS = ("logit_scale", "logit_bias")


def read(source: Source, folder: Path) -> Imported:
    """Read both towers; raises ArtifactError for a part that ours cannot represent."""
    config = read_config(source)
    image, text = config.vision_config, config.text_config
    if not getattr(image, "vision_use_head", True):
        raise ArtifactError(
            f"{source}: the image tower has no pooling head (vision_use_head=false)"
        )
    state = source.tensors()
    sizes = vision_sizes(source, image, image.intermediate_size)
    patches = getattr(image, "num_patches", None)  # of Siglip2Model, at its own resolution
    side = image.image_size if patches is None else sizes["patch_size"] * math.isqrt(patches)
    model = vit(
        SIGLIP_VIT,
        image.layer_norm_eps,
        "map",
        **sizes,
        act_layer=activation(source, image.hidden_act),
    )
    table = VISION if patches is None else VISION_2
    found = table.to_ours(part(state, IMAGE))
    named = complete(source, "the image tower", found, IMAGE)
    data = of_transformers(source, named, side)
    if patches is not None:  # its processor keeps the ratio, with fewer patches on one side
        data = dataclasses.replace(data, resize="squash")
    vision = Vision(model, data, named, partial(table.theirs, prefix=IMAGE))
    texts = text_part(state)
    own = {name: value for name, value in texts.items() if not name.startswith("head.")}
    projection = HEAD.to_ours({in_text(k): v for k, v in texts.items() if k not in own})
    head = complete(source, "the joint space", projection) | flat(state, *SCALARS)
    require_tokenizer(source, folder)
    tower = siglip_text(source, folder, text_sizes(text), own, in_text)
    joint = linear_head(image.hidden_size, "none", bias=True)
    return Imported("transformers", vision, tower, joint, head, HEAD.theirs)


FAMILY = Family("SiglipModel", lambda source: source.kind in KINDS, read)
