"""Export of the image backbone as a folder that `timm.create_model("local-dir:...")` loads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from data_pipelines.decode.preparation import resized_side
from xray.artifacts.artifact import Artifact, save_tensors
from xray.artifacts.encoders import VisionEncoder
from xray.artifacts.manifest_config import data_config, image_side, license_of, model_config
from xray.config import DataConfig
from xray.errors import ArtifactError, brief
from xray.exports.common import (
    Export,
    difference,
    image_state,
    is_present,
    ours,
    sample_images,
    save_json,
    vision_of,
)
from xray.models.timm_vit import GLOBAL_POOL


def to_timm(artifact: Artifact, out: Path) -> Export:
    """Write config.json and model.safetensors; raises ArtifactError for other models."""
    encoder, side = vision_of(artifact, "timm"), image_side(artifact)
    settings = timm_config(artifact, encoder, side)
    state = image_state(encoder, side)
    try:
        vit = timm.create_model(settings["architecture"], num_classes=0, **settings["model_args"])
        vit.load_state_dict(state)
    except Exception as error:  # timm raises many kinds
        raise ArtifactError(f"{artifact.origin} cannot be built by timm: {brief(error)}") from error
    save_tensors(out / "model.safetensors", state)
    save_json(out / "config.json", settings)

    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    pixels = sample_images(side)
    with torch.no_grad():
        theirs = loaded(encoder.normalize(pixels)[:, 0])
    code = [
        "import timm",
        "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # this folder',
        "preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        'features = model(preprocess(image.convert("RGB"))[None])  # of a PIL picture: [1, D]',
    ]
    differences = {"features": difference(theirs, ours(encoder, pixels, 1.0))}
    return Export("timm", code, differences, _notes(model_config(artifact).norm_eps, loaded))


def _notes(norm_eps: float | None, loaded: nn.Module) -> list[str]:
    """Say that timm's norms have another epsilon, which no file of timm can set."""
    usual = next((m.eps for m in loaded.modules() if isinstance(m, nn.LayerNorm)), norm_eps)
    if norm_eps in (None, usual):
        return []
    return [
        f"Its layer norms have the epsilon {norm_eps:g} (model.norm_eps), and {usual:g} in timm, "
        "whose folders have no such setting. The difference includes it."
    ]


def timm_config(artifact: Artifact, encoder: VisionEncoder, side: int) -> dict[str, Any]:
    """Make timm's config: model arguments and image transforms."""
    model, data, vision = model_config(artifact), data_config(artifact), encoder.vision
    mean, std = data.normalisation
    arguments = {
        **model.kwargs,
        "img_size": [side, side],
        "class_token": vision.cls_token is not None,
        "no_embed_class": vision.position_prefix == 0,
        "global_pool": GLOBAL_POOL.get(model.pool, "token"),
        "use_fc_norm" if vision.eva else "fc_norm": is_present(vision.fc_norm),
    }
    return {
        "architecture": model.name.partition(".")[0],
        "num_classes": 0,
        "num_features": vision.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "xray",
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": data.interpolation,
            "crop_pct": _crop_pct(data, side),
            "crop_mode": "squash" if data.resize == "squash" else "center",
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": license_of(artifact.manifest) or "unknown",
        },
    }


def _crop_pct(data: DataConfig, side: int) -> float:
    """Return a share from which timm, which rounds down, computes our size before the crop."""
    whole = resized_side(data, side)
    same = math.floor(side / data.crop_pct) == whole
    return data.crop_pct if same else side / (whole + 0.5)
