"""Export as a folder that transformers' AutoModel and AutoProcessor load, without remote code.

A clip artifact whose text tower is CLIP's becomes a CLIPModel, or a VisionTextDualEncoderModel
where its image tower is no CLIP's; one with both of SigLIP's towers becomes a SiglipModel. Other
artifacts become a ViTModel, a Dinov2Model, or another class of image towers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.decode.preparation import resized_side
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import Encoder, ImageEncoder, VisionEncoder
from xray.artifacts.manifest_config import data_config, image_side
from xray.errors import ArtifactError, brief
from xray.exports.common import (
    CAPTIONS,
    RESAMPLE,
    Export,
    difference,
    ours,
    sample_images,
    save_sharded,
    vision_of,
)
from xray.exports.names.siglip import HEAD
from xray.exports.transformers_vision import Tower, add_pooler, image_tower, unsupported_vision
from xray.models.llm_folder import NO_REMOTE_CODE, quiet_transformers
from xray.models.text_tower import merge_lora

ADAPTER = "the text features go through LLM2CLIP's adaptor (clip.text_head=adapter)"
CLASSES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
SIGLIP = ("SiglipTextModel", "Siglip2TextModel")
PREFIXED = ("clip_vision_model", "siglip_vision_model")  # their files have the prefix vision_model.


@dataclass
class Made:
    """A model of transformers: its class, config.json and weights."""

    name: str
    config: Any
    state: dict[str, Tensor]


def to_transformers(artifact: Artifact, out: Path) -> Export:
    """Write config, weights, and the processor of images and texts.

    Raises ArtifactError for a model that no class of transformers can represent.
    """
    quiet_transformers()
    encoder, side = vision_of(artifact, "transformers"), image_side(artifact)
    reason = unsupported_vision(encoder)
    if reason:
        raise ArtifactError(
            f"{artifact.origin} cannot be a model of transformers: {reason}; use --to timm for the "
            "backbone, or --to safetensors for all weights"
        )
    tower, notes = image_tower(encoder, side), []
    texts, missing = _texts(artifact, encoder, tower)
    if texts is not None:
        made = _two_towers(texts, tower)
    else:
        made = _one_tower(encoder, tower)
        notes = _notes_of_one(encoder, made, missing)
    bias = artifact.has_tensor("head", "logit_bias") if texts is not None else False
    if bias and made.name != "SiglipModel":
        notes.append(
            f"{made.name} has no bias of the sigmoid loss: its logits_per_image are those of "
            "clip.loss=sigmoid without the bias. The features are the same."
        )
    made.config.architectures = [made.name]
    made.config.dtype = "float32"
    made.config.save_pretrained(out)
    save_sharded(out, made.state)
    _save_processor(artifact, texts, made, out)
    differences = _compare(artifact, encoder, texts, out)
    return Export("transformers", _code(made, texts), differences, notes)


def _texts(artifact: Artifact, encoder: VisionEncoder, tower: Tower) -> tuple[Encoder | None, str]:
    """Load the text tower if transformers can read it with the image tower, else say why not."""
    if not isinstance(encoder, ImageEncoder):
        return None, ""
    if not artifact.has_tensor("head", "text_adapter.weight"):
        return None, ADAPTER
    loaded = Encoder(artifact)
    siglip = type(loaded.text.llm).__name__ in SIGLIP
    reason = unsupported_siglip(loaded) if siglip else unsupported_text(loaded)
    if tower.kind == "dinov3_vit":
        reason = "no class of transformers joins DINOv3ViTModel and a text tower"
    if not reason and siglip != (tower.kind == "siglip_vision_model"):
        reason = f"no class joins {CLASSES[tower.kind]} and {type(loaded.text.llm).__name__}"
    return (None, reason) if reason else (loaded, "")


def unsupported_text(encoder: Encoder) -> str:
    """Return the reason why CLIP's two-tower models cannot read a text tower, or ""."""
    kind, tokenizer = type(encoder.text.llm).__name__, encoder.tokenizer
    if kind != "CLIPTextModel":
        return f"the text tower is a {kind}, and two-tower models read those of CLIP and SigLIP"
    if encoder.text.pooling != "last" or tokenizer.prompt or tokenizer.full:
        return "the text tower is not pooled at the end token of the caption without a prompt"
    if any(name.endswith(".bias") for name in encoder.artifact.load("head")):
        return "the projections into the joint space have a bias"
    end = tokenizer.tokenizer.eos_token_id
    if tokenizer.tokenizer("a")["input_ids"][-1] != end:
        return "the tokenizer ends no caption in an end token"
    if end == 2:  # as in faulty files of before transformers 4.30
        return "the end token has the number 2, for which CLIPTextModel reads the largest token"
    return ""


def unsupported_siglip(encoder: Encoder) -> str:
    """Return the reason why SiglipModel cannot read a text tower, or ""."""
    tokenizer = encoder.tokenizer
    if encoder.text.pooling != "last" or tokenizer.prompt or not tokenizer.full:
        return "the text tower is not pooled at the last token of a padded caption without a prompt"
    if encoder.artifact.has_tensor("head", "vision_projection.weight"):
        return "SiglipModel has no projection of images (clip.image_head=linear)"
    return ""


def _two_towers(texts: Encoder, tower: Tower) -> Made:
    """Join the towers: CLIPModel or SiglipModel for those of CLIP and SigLIP, else the dual one."""
    from transformers import CLIPConfig, SiglipConfig, VisionTextDualEncoderConfig

    llm: Any = merge_lora(texts.text.float().llm)
    text, head = llm.config.to_dict(), texts.artifact.load("head")
    text.pop("_name_or_path", None)  # a folder of this machine
    state = {f"text_model.{name}": tensor for name, tensor in llm.state_dict().items()}
    if tower.kind == "vit":
        add_pooler(tower, None)
    state |= {f"vision_model.{name}": tensor for name, tensor in tower.state.items()}
    width = len(head["text_adapter.weight"])
    if tower.kind == "siglip_vision_model":
        head.setdefault("text_adapter.bias", torch.zeros(width))
        state |= HEAD.to_theirs({k: v for k, v in head.items() if k.startswith("text_")}).state
        scalars = {k: head.get(k, torch.zeros(1)).reshape(1) for k in ("logit_scale", "logit_bias")}
        text |= {"projection_size": width}
        own = SiglipConfig(text_config=text, vision_config=tower.settings)
        return Made("SiglipModel", own, state | scalars)
    text |= {"eos_token_id": texts.tokenizer.tokenizer.eos_token_id, "projection_dim": width}
    projection = head.get("vision_projection.weight", torch.eye(width))
    state |= {
        "visual_projection.weight": projection,
        "text_projection.weight": head["text_adapter.weight"],
        "logit_scale": head["logit_scale"].reshape(()),
    }
    name = "VisionTextDualEncoderModel"
    kind: Any = VisionTextDualEncoderConfig
    if tower.kind == "clip_vision_model":
        name, kind = "CLIPModel", CLIPConfig
        tower.settings["projection_dim"] = width
    config = kind(vision_config=tower.settings, text_config=text, projection_dim=width)
    return Made(name, config, state)


def _one_tower(encoder: VisionEncoder, tower: Tower) -> Made:
    """Return the image tower; a ViTModel's pooler holds the projection into a joint space."""
    from transformers import AutoConfig

    if tower.kind == "vit":
        joint = isinstance(encoder, ImageEncoder)
        head = encoder.artifact.load("head") if joint else {}
        bias = head.get("vision_projection.bias")
        add_pooler(tower, head.get("vision_projection.weight"), bias)
    config = AutoConfig.for_model(**tower.settings)
    prefix = "vision_model." if tower.kind in PREFIXED else ""
    return Made(CLASSES[tower.kind], config, {f"{prefix}{k}": v for k, v in tower.state.items()})


def _notes_of_one(encoder: VisionEncoder, made: Made, missing: str) -> list[str]:
    if not missing:
        return []
    held = "its pooler_output is the projection into the joint space"
    if made.name == "SiglipVisionModel":
        held = "its pooler_output is the feature of the backbone"
    elif made.name != "ViTModel":
        held = "it has no place for the projection into the joint space, so its features are CLS"
    return [f"This folder has only the image tower: {missing}. {made.name}: {held}."]


def _save_processor(artifact: Artifact, texts: Encoder | None, made: Made, out: Path) -> None:
    """Write what AutoProcessor reads: the preparation of images, and the tokenizer."""
    from transformers import (
        CLIPImageProcessor,
        CLIPProcessor,
        SiglipProcessor,
        VisionTextDualEncoderProcessor,
    )

    data, side = data_config(artifact), image_side(artifact)
    whole, squash = resized_side(data, side), data.resize == "squash"
    images = CLIPImageProcessor(
        size={"height": whole, "width": whole} if squash else {"shortest_edge": whole},
        crop_size={"height": side, "width": side},
        do_center_crop=not squash or whole != side,
        resample=RESAMPLE[data.interpolation],
        image_mean=data.mean,
        image_std=data.std,
    )
    images.save_pretrained(out)
    if texts is None:
        return
    tokenizer = copy.deepcopy(texts.tokenizer.tokenizer)
    tokenizer.model_max_length = texts.tokenizer.max_length
    if made.name == "SiglipModel":  # which attends to the padding
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    kinds = {"CLIPModel": CLIPProcessor, "SiglipModel": SiglipProcessor}
    kind: Any = kinds.get(made.name, VisionTextDualEncoderProcessor)
    kind(image_processor=images, tokenizer=tokenizer).save_pretrained(out)


def _compare(
    artifact: Artifact, encoder: VisionEncoder, texts: Encoder | None, out: Path
) -> dict[str, float]:
    """Load the folder as a user does, and compare its features with ours."""
    from transformers import AutoModel, AutoProcessor

    options = {"local_files_only": True, **NO_REMOTE_CODE}
    try:
        loaded, told = AutoModel.from_pretrained(out, output_loading_info=True, **options)
        processor = AutoProcessor.from_pretrained(out, **options)
    except Exception as error:  # transformers raises many kinds
        raise ArtifactError(f"transformers cannot load what was written: {brief(error)}") from error
    wrong = {name for key in ("missing_keys", "unexpected_keys") for name in told[key]}
    if wrong or told["mismatched_keys"]:
        raise ArtifactError(f"transformers reads other weights than were written: {min(wrong)}")
    pixels, encoder.keep_rate = sample_images(image_side(artifact)), 1.0
    inputs = {"pixel_values": encoder.normalize(pixels)[:, 0]}
    if texts is not None:
        padding = "max_length" if texts.tokenizer.full else True
        own = {"padding": padding, "truncation": True, "return_tensors": "pt"}
        inputs |= processor(text=list(CAPTIONS), **own)
    with torch.no_grad():
        outputs = loaded.eval()(**inputs)
    if texts is not None:
        return {
            "image features": difference(outputs.image_embeds, texts.encode_pixels(pixels)),
            "text features": difference(outputs.text_embeds, texts.encode_text(CAPTIONS)),
        }
    if isinstance(encoder, ImageEncoder) and loaded.config.model_type == "vit":
        return {"image features": difference(outputs.pooler_output, encoder.encode_pixels(pixels))}
    return {"features": difference(outputs.pooler_output, ours(encoder, pixels, 1.0))}


def _code(made: Made, texts: Encoder | None) -> list[str]:
    code = [
        "from transformers import AutoModel, AutoProcessor",
        "",
        'model = AutoModel.from_pretrained("FOLDER").eval()  # this folder',
        'processor = AutoProcessor.from_pretrained("FOLDER")',
    ]
    if texts is None:
        return [
            *code,
            'inputs = processor(images=[picture], return_tensors="pt")  # of PIL pictures',
            "features = model(**inputs).pooler_output  # [1, D]",
        ]
    padding = '"max_length"' if texts.tokenizer.full else "True"
    return [
        *code,
        "inputs = processor(  # texts, and PIL pictures",
        '    text=["a dog on a beach"], images=[picture], return_tensors="pt",',
        f"    padding={padding}, truncation=True,",
        ")",
        "outputs = model(**inputs)",
        "image, text = outputs.image_embeds, outputs.text_embeds  # [1, E], of unit length",
    ]
