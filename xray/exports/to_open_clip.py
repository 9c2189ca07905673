"""Export as a folder that open_clip's `local-dir:` loads: both towers, or the image tower.

open_clip's own ViT takes any width, depth and size. Its text tower is CLIP's (2103.00020), a causal
transformer read at its end token, then one linear map; or SigLIP's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xray.artifacts.artifact import Artifact, save_tensors
from xray.artifacts.encoders import Encoder, ImageEncoder
from xray.artifacts.manifest_config import data_config, image_side
from xray.errors import ArtifactError, ConfigError, brief
from xray.exports.common import CAPTIONS, Export, difference, sample_images, save_json, vision_of
from xray.exports.open_clip_towers import (
    is_quick,
    text_settings,
    text_state,
    unsupported_text,
    unsupported_vision,
    vision_settings,
    vision_state,
)

MODEL = "open_clip_model.safetensors"
# Placeholder for a missing text tower, so that open_clip loads the image tower. Reading texts
# fails: the tokenizer refuses an argument whose name says why, and encode_text finds no end token.
NO_TEXT: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49_408,  # as open_clip's own, because a lookup beyond it would end a CUDA process
    "width": 1,
    "heads": 1,
    "layers": 1,
    "pool_type": "eos",
    "eos_id": None,
}
REFUSAL = "this_model_has_no_text_tower"


def to_open_clip(artifact: Artifact, out: Path) -> Export:
    """Write open_clip_config.json and the image tower's weights; the text tower's, if it is CLIP's.

    Raises ArtifactError for a backbone that open_clip's ViT cannot represent, ConfigError if
    open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            "--to open_clip needs pip install 'xray-trainer[open_clip]' to check what it writes"
        ) from error
    encoder, side = vision_of(artifact, "open_clip"), image_side(artifact)
    if not isinstance(encoder, ImageEncoder):
        raise ArtifactError(
            f"{artifact.origin} is of stage {artifact.stage}: --to open_clip is for stage clip; "
            "use --to timm for a backbone"
        )
    reason = unsupported_vision(encoder)
    if reason:
        raise ArtifactError(
            f"{artifact.origin} cannot be open_clip's ViT: {reason}; use --to timm for the backbone"
        )
    texts, missing = text_side(artifact)
    save_json(out / "open_clip_config.json", _config(artifact, encoder, texts, side))
    state = vision_state(encoder, side) | _scalars(artifact)
    if texts is None:
        state |= _no_text(encoder)
    else:
        prefix = "text." if is_custom(texts) else ""
        state |= {f"{prefix}{name}": value for name, value in text_state(texts).items()}
        texts.tokenizer.tokenizer.save_pretrained(out)
    save_tensors(out / MODEL, state)

    name = f"local-dir:{out}"
    try:
        model = open_clip.create_model(name).eval()
    except Exception as error:  # a shape that open_clip builds differently
        raise ArtifactError(f"open_clip cannot load what was written: {brief(error)}") from error
    pixels, encoder.keep_rate = sample_images(side), 1.0
    with torch.no_grad():
        image = model.encode_image(encoder.normalize(pixels)[:, 0])
        differences = {"image features": difference(image, encoder.encode_pixels(pixels))}
        if texts is not None:
            tokens = open_clip.get_tokenizer(name)(list(CAPTIONS))
            text = model.encode_text(tokens)
            differences["text features"] = difference(text, texts.encode_text(CAPTIONS))
    notes = [*_notes(missing), *_crop_notes(data_config(artifact).crop_pct)]
    return Export("open_clip", _code(texts is not None), differences, notes)


def text_side(artifact: Artifact) -> tuple[Encoder | None, str]:
    """Load the text tower if open_clip can build it, else say why not; an LLM is not loaded."""
    if not artifact.has_tensor("head", "text_adapter.weight"):
        return None, (
            "the text features go through LLM2CLIP's adaptor (clip.text_head=adapter), which "
            "open_clip has no place for; clip.text_head=linear is CLIP's own"
        )
    encoder = Encoder(artifact)
    reason = unsupported_text(encoder)
    return (None, reason) if reason else (encoder, "")


def _code(with_text: bool) -> list[str]:
    code = [
        "import open_clip",
        "",
        'name = "local-dir:FOLDER"  # this folder',
        "model, preprocess = open_clip.create_model_from_pretrained(name)",
        "image = model.encode_image(preprocess(picture)[None], normalize=True)  # of a PIL picture",
    ]
    if with_text:
        code += [
            "tokenizer = open_clip.get_tokenizer(name)",
            'text = model.encode_text(tokenizer(["a dog on a beach"]), normalize=True)',
        ]
    return code


def _notes(missing: str) -> list[str]:
    if missing:
        return [
            f"This folder has only the image tower and its projection: {missing}. "
            "`open_clip.get_tokenizer` and `encode_text` raise an error, because there is no text "
            f"tower (`{REFUSAL}`)."
        ]
    return [
        "open_clip's tokenizer repairs unicode and joins white space before it reads a caption; "
        "the original reads it unchanged."
    ]


def _crop_notes(crop_pct: float) -> list[str]:
    if crop_pct == 1:
        return []
    return [
        f"open_clip's preprocessing has no crop of {crop_pct:g}: it shows the whole short side."
    ]


def _config(
    artifact: Artifact, encoder: ImageEncoder, texts: Encoder | None, side: int
) -> dict[str, Any]:
    data, text = data_config(artifact), {**NO_TEXT, "tokenizer_kwargs": {REFUSAL: True}}
    model: dict[str, Any] = {
        "embed_dim": encoder.options.embed_dim,
        "quick_gelu": is_quick(encoder),
        "vision_cfg": vision_settings(encoder, side),
        "text_cfg": text if texts is None else text_settings(texts),
        "custom_text": is_custom(texts),
    }
    if artifact.has_tensor("head", "logit_bias"):
        model["init_logit_bias"] = 0.0  # replaced by the weights
    mean, std = data.normalisation
    mode = "squash" if data.resize == "squash" else "shortest"
    reads = {"interpolation": data.interpolation, "resize_mode": mode, "size": side}
    preprocess = {**reads, "mean": mean, "std": std}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def is_custom(texts: Encoder | None) -> bool:
    """Tell if open_clip's names of the text tower begin with `text.`, as SigLIP's."""
    return texts is not None and texts.tokenizer.full


def _no_text(encoder: ImageEncoder) -> dict[str, Tensor]:
    """Make the weights of NO_TEXT, all NaN."""
    from open_clip.transformer import TextTransformer

    tower = TextTransformer(**NO_TEXT, output_dim=encoder.options.embed_dim)
    return {name: torch.full_like(t, torch.nan) for name, t in tower.state_dict().items()}


def _scalars(artifact: Artifact) -> dict[str, Tensor]:
    """Return the log of the logit scale, and the sigmoid loss's bias."""
    head = artifact.load("head")
    return {k: head[k].reshape(()) for k in ("logit_scale", "logit_bias") if k in head}
