"""Export as plain weights: each tower in its own file, by the names of its library.

vision.safetensors   timm's names, stem and positions for clips included
head.safetensors     projections, tag head, logit scale
decoder.safetensors  if there is a MAE decoder
text/                a transformers folder with LoRA merged into the weights, and its tokenizer
config.json          stage, sizes and settings of all parts
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from xray.artifacts.artifact import Artifact, save_tensors
from xray.artifacts.encoders import (
    Encoder,
    TextEncoder,
    VisionEncoder,
    encode_captions,
    restore_encoder,
)
from xray.artifacts.manifest_config import (
    data_config,
    image_side,
    model_config,
    stage_sections,
    text_config,
)
from xray.config.data import PREPARATION
from xray.config.schedule import largest
from xray.exports.common import CAPTIONS, Export, difference, ours, sample_images, save_json
from xray.models.backbone import VisionBackbone
from xray.models.text_tower import TextTower, merge_lora

PREPROCESSING = ("resolution", "frames", "mean", "std", *PREPARATION)
PARTS = {"backbone": "vision", "head": "head", "decoder": "decoder"}


def to_safetensors(artifact: Artifact, out: Path) -> Export:
    """Write all of an artifact's weights, and those of its base LLM."""
    encoder = restore_encoder(artifact)
    for part, name in PARTS.items():
        if part in artifact.manifest["tensors"]:
            save_tensors(out / f"{name}.safetensors", artifact.load(part))
    if "vocabulary.json" in artifact.manifest["files"]:
        shutil.copyfile(artifact.file("vocabulary.json"), out / "vocabulary.json")
    save_json(out / "config.json", _config(artifact))
    differences, code = {}, ["from safetensors.torch import load_file", ""]
    if isinstance(encoder, VisionEncoder):
        differences["vision"] = _check_vision(artifact, encoder, out)
        code.append('vision = load_file("FOLDER/vision.safetensors")  # timm\'s names')
    if isinstance(encoder, Encoder | TextEncoder):
        differences["text"] = _write_text(encoder, out)
        code += [
            "from transformers import AutoModel",
            'text = AutoModel.from_pretrained("FOLDER/text")  # read it as config.json says',
        ]
    return Export("safetensors", code, differences)


def _config(artifact: Artifact) -> dict[str, Any]:
    data = {name: getattr(data_config(artifact), name) for name in PREPROCESSING}
    sections = stage_sections(artifact.manifest)
    keep_rate = artifact.manifest["keep_rate"]
    return {"stage": artifact.stage, "keep_rate": keep_rate, "data": data, **sections}


def _check_vision(artifact: Artifact, encoder: VisionEncoder, out: Path) -> float:
    """Compare a new backbone with the file's weights on images, and return the difference."""
    data = data_config(artifact)
    sizes = largest(data.resolution), largest(data.frames)
    backbone = VisionBackbone(model_config(artifact), *sizes).eval()
    backbone.load_state_dict(load_file(out / "vision.safetensors"))
    pixels, rate = sample_images(image_side(artifact)), encoder.keep_rate
    with torch.no_grad():
        theirs = backbone(encoder.normalize(pixels), rate).cls
    return difference(theirs, ours(encoder, pixels, rate))


def _write_text(encoder: Encoder | TextEncoder, out: Path) -> float:
    """Write the language model, and return how its sentence vectors differ once loaded again."""
    tower, tokenizer, device = encoder.text.float(), encoder.tokenizer, torch.device("cpu")
    expected = encode_captions(CAPTIONS, tokenizer, lambda x: tower(**x), device)
    llm: Any = merge_lora(tower.llm)
    llm.save_pretrained(out / "text")
    tokenizer.tokenizer.save_pretrained(out / "text")
    config = text_config(encoder.artifact)
    pooling: Any = tower.pooling
    plain = dataclasses.replace(config, tune="none", lora_rank=0, pooling=pooling, dtype="fp32")
    loaded = TextTower(plain, out / "text").eval()
    if tower.pooler is not None and loaded.pooler is not None:
        state = tower.pooler.state_dict()
        save_tensors(out / "text" / "pooler.safetensors", state)
        loaded.pooler.load_state_dict(load_file(out / "text" / "pooler.safetensors"))
    written = encode_captions(CAPTIONS, tokenizer, lambda x: loaded(**x), device)
    return difference(written, expected)
