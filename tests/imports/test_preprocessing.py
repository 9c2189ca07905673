"""Preparation of pictures by an imported artifact against transformers' image processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from in_process import invoke
from PIL import Image
from released import MEAN, STD, shaken

from data_pipelines.decode.preparation import prepare
from xray.api import load
from xray.imports.preprocessing import of_transformers
from xray.imports.source import open_source

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
OWN = {"image_mean": MEAN, "image_std": STD}
DINOV2 = {  # as published with facebook/dinov2-base, whose config.json has image_size 518
    "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225], "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}  # fmt: skip
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {  # model_type, preprocessor_config.json
    "dinov2": ("dinov2", DINOV2),
    "ViT of the time of feature extractors": (
        "vit",
        {**HALF, "do_normalize": True, "do_resize": True, "resample": 2, "size": 48,
         "feature_extractor_type": "ViTFeatureExtractor"},
    ),
    "ViT without resample": ("vit", {**HALF, "image_processor_type": "ViTImageProcessor"}),
    "MAE": ("vit_mae", {**OWN, "size": {"height": 48, "width": 48}, "resample": 3}),
    "CLIP of the time of feature extractors": (
        "clip",
        {**HALF, "crop_size": 48, "do_center_crop": True, "size": 56, "resample": 3,
         "feature_extractor_type": "CLIPFeatureExtractor"},
    ),
    "CLIP's defaults": ("clip", {}),
    "CLIP without a crop": ("clip", {"size": {"height": 48, "width": 48}, "do_center_crop": False}),
    "SigLIP": ("siglip", {**HALF, "size": {"height": 48, "width": 48},
               "image_processor_type": "SiglipImageProcessorFast"}),
    "DeiT": ("vit", {"image_processor_type": "DeiTImageProcessor", "size": 64, "crop_size": 56}),
    "VideoMAE": ("vit", {"image_processor_type": "VideoMAEImageProcessor", "do_normalize": False}),
    "DINOv3": ("dinov3_vit", {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": 48}),
}  # fmt: skip
# The spare pixels of a side are no 3, 7, 11, ...: half of these is rounded up here, as in
# torchvision and open_clip, and down in transformers.
SIDES = ((61, 83), (95, 57), (301, 331))  # widths and heights


def picture(width: int, height: int) -> Image.Image:
    draw = torch.Generator().manual_seed(width)
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=draw)
    return Image.fromarray(noise.numpy())


def processor_of(folder: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("nested", (False, True), ids=("alone", "in processor_config.json"))
@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_prepared_as_by_the_processor(name: str, nested: bool, tmp_path: Path) -> None:
    kind, content = PROCESSORS[name]
    own = {"image_processor": content} if nested else content
    file = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / file).write_text(json.dumps(own or {"do_rescale": True}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    data, processor = of_transformers(open_source(str(tmp_path)), {}), processor_of(tmp_path)
    mean, std = (torch.tensor(x)[:, None, None] for x in data.normalisation)
    for width, height in SIDES:
        image = picture(width, height)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0] * std + mean
        frames = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        ours = prepare(frames, data, data.resolution)[0][0] / 255
        away = (ours - theirs).abs().max().item() * 255
        assert away < (1 if name == "DINOv3" else 1e-2), (width, height)  # it resizes floats


@pytest.mark.parametrize("kind", ("Dinov2", "Dinov2WithRegisters"))
@torch.no_grad()
def test_dinov2_reads_crops_that_are_smaller_than_its_position_table(
    kind: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(image_size=518, patch_size=14, **sizes)
    model = shaken(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path / "released")
    (tmp_path / "released" / "preprocessor_config.json").write_text(json.dumps(DINOV2))
    done = invoke("import", tmp_path / "released", "--out", tmp_path / "artifact")
    assert done.exit_code == 0, done.output
    ours, processor = load(tmp_path / "artifact"), processor_of(tmp_path / "released")
    assert (ours.resolution, ours.data.crop_pct) == (224, 224 / 256)
    image = picture(301, 331)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    theirs = F.normalize(model(pixels).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(ours.encode_image(image), theirs, rtol=0, atol=1e-5)
