"""Preparation of images, as transformers' and open_clip's folders state it, in section data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xray.config import DataConfig
from xray.errors import ArtifactError, brief
from xray.exports.common import RESAMPLE
from xray.imports.parts import side_of, square
from xray.imports.source import Source
from xray.models.llm_folder import NO_REMOTE_CODE

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


def of_transformers(source: Source, state: Mapping[str, Tensor], side: Any = None) -> DataConfig:
    """Read how a folder's image processor prepares pictures; raises ArtifactError without one.

    transformers itself reads it: what a file leaves out is a default of the processor's class.
    state: the backbone's tensors by timm's names. side: that of the pictures, if transformers does
    not resize the model's position table; None = that of the processor's crops.
    """
    processor = _processor(source)
    size = dict(processor.size or {"height": side, "width": side})
    squash = "height" in size
    if not squash and "shortest_edge" not in size:
        raise ArtifactError(f"{source}/{FILE}: size={size} is not supported")
    whole = square(source, [size["height"], size["width"]] if squash else size["shortest_edge"])
    crop, normalised = whole, processor.do_normalize
    if getattr(processor, "do_center_crop", False):
        crop = square(source, [processor.crop_size["height"], processor.crop_size["width"]])
    if crop > whole:
        raise ArtifactError(
            f"{source}/{FILE}: crop_size={crop} is above size={whole}: pictures are not padded"
        )
    return _data(
        source,
        side_of(source, crop if side is None else side, state),
        processor.image_mean if normalised else [0.0, 0.0, 0.0],
        processor.image_std if normalised else [1.0, 1.0, 1.0],
        "squash" if squash else "shortest",
        INTERPOLATION.get(processor.resample, ""),
        crop / whole,
    )


def _processor(source: Source) -> Any:
    """Read a folder's image processor, which may be in the file of one for images and texts."""
    from transformers import AutoImageProcessor

    if not source.json(FILE) and "image_processor" not in source.json("processor_config.json"):
        raise ArtifactError(
            f"{source} has no {FILE}: the mean and std of its images are not known; "
            "save_pretrained of its image processor writes it"
        )
    options: dict[str, Any] = {"backend": "pil", "local_files_only": True, **NO_REMOTE_CODE}
    try:
        return AutoImageProcessor.from_pretrained(source.folder, **options)
    except Exception as error:  # transformers raises many kinds
        raise ArtifactError(
            f"{source}/{FILE} cannot be read by transformers: {brief(error)}"
        ) from error


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
