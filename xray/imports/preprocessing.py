"""Preparation of images, as transformers' and open_clip's folders state it, in section data."""

from __future__ import annotations

from typing import Any

from xray.config import DataConfig
from xray.errors import ArtifactError
from xray.exports.common import RESAMPLE
from xray.imports.source import Source

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]  # open_clip's default
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
INTERPOLATION = {number: name for name, number in RESAMPLE.items()}
FILE = "preprocessor_config.json"


def of_open_clip(source: Source, given: dict[str, Any], side: int) -> DataConfig:
    """Read section preprocess_cfg of an open_clip_config.json."""
    mode = given.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ArtifactError(f"{source}: preprocess_cfg.resize_mode={mode} is not supported")
    return _data(
        source,
        side,
        given.get("mean", CLIP_MEAN),
        given.get("std", CLIP_STD),
        mode,
        given.get("interpolation", "bicubic"),
    )


def of_transformers(source: Source, side: int) -> DataConfig:
    """Read the preprocessor_config.json of a folder; raises ArtifactError if there is none."""
    given = source.json(FILE)
    if not given:
        raise ArtifactError(
            f"{source} has no {FILE}: the mean and std of its images are not known; "
            "save_pretrained of its image processor writes it"
        )
    normalised = given.get("do_normalize", True)
    mean, std = ([*given.get(f"image_{name}", [])] for name in ("mean", "std"))
    if normalised and not (len(mean) == len(std) == 3):
        raise ArtifactError(f"{source}/{FILE} has no image_mean and image_std")
    size, crop = given.get("size"), given.get("crop_size")
    squash = isinstance(size, dict) and "height" in size
    edge = "height" if squash else "shortest_edge"
    shortest = size.get(edge, side) if isinstance(size, dict) else size or side
    cut = given.get("do_center_crop", crop is not None)
    return _data(
        source,
        side,
        mean if normalised else [0.0, 0.0, 0.0],
        std if normalised else [1.0, 1.0, 1.0],
        "squash" if squash else "shortest",
        INTERPOLATION.get(given.get("resample", 3), ""),
        side / shortest if cut else 1.0,
    )


def _data(
    source: Source,
    side: int,
    mean: list[float],
    std: list[float],
    resize: Any,
    interpolation: Any,
    crop_pct: float = 1.0,
) -> DataConfig:
    if interpolation == "random":  # open_clip's training draws one; evaluation is bicubic
        interpolation = "bicubic"
    if interpolation not in RESAMPLE:
        raise ArtifactError(f"{source}: images are resized by neither bicubic nor bilinear")
    return DataConfig(
        resolution=side, mean=[float(x) for x in mean], std=[float(x) for x in std],
        resize=resize, interpolation=interpolation, crop_pct=crop_pct,
    )  # fmt: skip
