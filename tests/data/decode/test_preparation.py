"""Preparation without augmentation: pixels of open_clip and timm, and what remains of a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from shards import photo
from torch import Tensor

from data_pipelines.decode.preparation import prepare, shown_box, view_boxes
from data_pipelines.decode.transforms import load_pixels, load_views, read_picture
from data_pipelines.shards.source import Sample, open_source
from xray.config import DataConfig
from xray.config.data import validate_data
from xray.errors import ConfigError

SIZES = ((160, 120), (121, 240), (97, 97), (500, 333))
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def loaded(media: bytes, side: int, **settings: Any) -> Tensor:
    """Load a picture as evaluation does, [3, S, S]."""
    sample = Sample({"jpg": media}, "s", "image", "k", side, 1)
    return load_pixels(sample, DataConfig(**settings), None)[0]


def levels(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [32, 112])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_whole_pictures_have_the_pixels_of_open_clip_and_timm(
    size: tuple[int, int], side: int, interpolation: str, mode: str
) -> None:
    media = photo(size[0], size, 90)
    image = Image.open(io.BytesIO(media)).convert("RGB")
    given: dict[str, Any] = {"interpolation": interpolation, "resize_mode": mode, **PLAIN}
    theirs = image_transform_v2(PreprocessCfg(size=side, **given), is_train=False)
    ours = loaded(media, side, resize=mode, interpolation=interpolation)
    assert torch.equal(ours, levels(theirs(image)))
    for share in (1.0, 0.9, 0.875):
        transform = timm.data.create_transform(
            (3, side, side), interpolation=interpolation, crop_pct=share,
            crop_mode="squash" if mode == "squash" else "center", **PLAIN,
        )  # fmt: skip
        ours = loaded(media, side, resize=mode, interpolation=interpolation, crop_pct=share)
        assert torch.equal(ours, levels(transform(image)))


def test_a_share_of_two_sizes_is_resized_to_the_larger_one() -> None:
    """transformers and torchvision state both sizes; their quotient is rounded: 96 / (96 / 118)."""
    media = photo(3, (200, 200))
    small = loaded(media, 96, resize="shortest", crop_pct=96 / 118)
    whole = loaded(media, 118, resize="shortest")
    assert torch.equal(small, whole[..., 11:107, 11:107])


@pytest.mark.parametrize("mode", ["crop", "shortest", "squash"])
def test_an_opened_picture_and_a_decoded_one_are_prepared_alike(mode: str) -> None:
    media, data = photo(3, (90, 60)), DataConfig(resolution=48, resize=mode, crop_pct=0.8)  # type: ignore[arg-type]
    opened, decoded = Image.open(io.BytesIO(media)), Image.open(io.BytesIO(media))
    decoded.load()
    assert torch.equal(read_picture(opened, data), read_picture(decoded, data))
    assert torch.equal(read_picture(opened, data)[0], loaded(media, 48, resize=mode, crop_pct=0.8))


def test_a_share_of_the_short_side_is_shown() -> None:
    assert view_boxes(320, 240, 1, 0.5) == [(100, 60, 120, 120)]
    assert view_boxes(320, 240, 3, 0.5) == [
        (0, 60, 120, 120),
        (100, 60, 120, 120),
        (200, 60, 120, 120),
    ]
    assert shown_box(320, 240, DataConfig(crop_pct=0.5)) == (100, 60, 120, 120)
    assert shown_box(320, 240, DataConfig(resize="squash")) == (0, 0, 320, 240)
    assert shown_box(320, 240, DataConfig(resize="squash", crop_pct=0.5)) == (80, 60, 160, 120)
    frames = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8)
    (middle,) = prepare(frames, DataConfig(crop_pct=0.5), 12)
    assert torch.equal(middle, frames[..., 6:18, 10:22])  # no resize at this size
    with pytest.raises(ConfigError, match=r"data.crop_pct=1.5 must be in \(0, 1\]"):
        validate_data(DataConfig(crop_pct=1.5))


def test_interpolation_and_crop_do_not_change_training(demo: Path) -> None:
    files = open_source("photos", "photos", "image", str(demo)).read(0, 0)
    sample = Sample(files, "s", "image", "k", 16, 1)
    changed = DataConfig(resize="squash", interpolation="bilinear", crop_pct=0.5)
    one, other = (
        load_pixels(sample, data, np.random.default_rng(1)) for data in (DataConfig(), changed)
    )
    assert torch.equal(one, other)
    assert not torch.equal(
        load_pixels(sample, DataConfig(), None), load_pixels(sample, changed, None)
    )


@pytest.mark.parametrize("mode", ["crop", "shortest", "squash"])
def test_the_views_of_a_clip_begin_with_the_one_of_evaluation(demo: Path, mode: str) -> None:
    files = open_source("clips", "clips", "video", str(demo)).read(0, 0)
    sample, data = Sample(files, "s", "video", "k", 16, 4), DataConfig(resize=mode)  # type: ignore[arg-type]
    view = load_views(sample, data, 1, 1)
    assert torch.equal(view[0], load_pixels(sample, data, None)) and view.shape == (1, 4, 3, 16, 16)
    if mode == "squash":
        with pytest.raises(ConfigError, match="squash shows the whole picture"):
            load_views(sample, data, 1, 3)
    else:
        assert torch.equal(load_views(sample, data, 1, 3)[1], view[0])
