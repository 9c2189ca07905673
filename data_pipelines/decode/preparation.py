"""Preparation of whole pictures for evaluation and inference: resize and crop, nothing random.

`data.resize: crop` takes the centre and resizes it once. `shortest` and `squash` resize the whole
picture first, as open_clip, timm and transformers do, and give their pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from xray.config import DataConfig
from xray.config.data import Interpolation
from xray.errors import ConfigError

Box = tuple[int, int, int, int]  # left, top, width, height


def center_crop(width: int, height: int, share: float = 1.0) -> Box:
    """Return the square in the centre whose side is a share of the short side."""
    return view_boxes(width, height, 1, share)[0]


def view_boxes(width: int, height: int, crops: int, share: float = 1.0) -> list[Box]:
    """Return square crops along the longer side: 1 in the centre, or 3 from end to end.

    share: side of a square, as a share of the short side. Raises ConfigError for another number of
    crops.
    """
    if crops not in (1, 3):
        raise ConfigError(f"crops={crops} must be 1 or 3")
    side = max(1, round(share * min(width, height)))
    return [(left, top, side, side) for left, top in _corners(width, height, side, crops)]


def _corners(width: int, height: int, side: int, crops: int) -> list[tuple[int, int]]:
    """Return (left, top) of square crops, rounded down, in the centre of the shorter side."""
    halves = (1,) if crops == 1 else (0, 1, 2)
    across, down = ([i if long else 1 for i in halves] for long in (width > height, height > width))
    free = width - side, height - side
    return [(free[0] * x // 2, free[1] * y // 2) for x, y in zip(across, down, strict=True)]


def shown_box(width: int, height: int, data: DataConfig) -> Box:
    """Return the part of a picture that evaluation shows, to the nearest pixel."""
    if data.resize != "squash":
        return center_crop(width, height, data.crop_pct)
    w, h = (max(1, round(data.crop_pct * side)) for side in (width, height))
    return (width - w) // 2, (height - h) // 2, w, h


def least_side(data: DataConfig, size: int) -> int:
    """Return the short side of a frame at which evaluation's crop is not enlarged."""
    return math.ceil(size / data.crop_pct)


def resized_side(data: DataConfig, size: int) -> int:
    """Return the short side to which a whole picture is resized before the crop to `size`.

    As in timm, where a share such as 224 / 232 is not rounded down.
    """
    return math.floor(size / data.crop_pct + 1e-6)


def crop_and_resize(
    frames: Tensor, box: Box, size: int, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Crop frames [T, 3, H, W] and resize them, antialiased, to [T, 3, S, S], as a new tensor."""
    left, top, w, h = box
    cropped = tv.crop(frames, top, left, h, w)
    if (h, w) == (size, size):
        return cropped.clone(memory_format=torch.contiguous_format)
    mode = InterpolationMode(interpolation)
    return tv.resize(cropped, [size, size], mode, antialias=True).contiguous()


def view_geometry(
    width: int, height: int, data: DataConfig, size: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return where evaluation's view of S x S pixels lies in a picture: its corner, and its scales.

    Position (u, v) in the view is (left + u * across, top + v * down) in the picture.
    """
    if not data.resizes_first:
        left, top, w, h = center_crop(width, height, data.crop_pct)
        return (left, top), (w / size, h / size)
    to = _resized_size(width, height, data, resized_side(data, size))
    across, down = width / to[0], height / to[1]
    left, top = (round((own - size) / 2) for own in to)
    return (left * across, top * down), (across, down)


def shown_pixels(width: int, height: int, data: DataConfig, size: int) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns of a picture that lie under the pixels of evaluation's view.

    Both are [S] long, for a view of S x S pixels: the pixels that are nearest to its pixels'
    centres, as a mask of class numbers needs them.
    """
    (left, top), (across, down) = view_geometry(width, height, data, size)
    centres = torch.arange(size, dtype=torch.float64) + 0.5

    def nearest(first: float, step: float, side: int) -> Tensor:
        return (first + centres * step).long().clamp(0, side - 1)

    return nearest(top, down, height), nearest(left, across, width)


def prepare(frames: Tensor, data: DataConfig, size: int, crops: int = 1) -> list[Tensor]:
    """Make one or three views [T, 3, S, S] of frames [T, 3, H, W] uint8 at full size.

    Raises ConfigError for three views of a squashed picture, which are equal.
    """
    height, width = frames.shape[2:]
    if not data.resizes_first:
        boxes = view_boxes(width, height, crops, data.crop_pct)
        return [crop_and_resize(frames, box, size, data.interpolation) for box in boxes]
    if data.resize == "squash" and crops != 1:
        raise ConfigError(f"crops={crops}: data.resize=squash shows the whole picture: set 1")
    resized = _resize_whole(frames, data, resized_side(data, size))
    height, width = resized.shape[2:]
    if crops == 1:  # torchvision's centre, which all those libraries take
        corners = [(round((width - size) / 2), round((height - size) / 2))]
    else:
        corners = _corners(width, height, size, crops)
    return [resized[..., y : y + size, x : x + size].contiguous() for x, y in corners]


def _resize_whole(frames: Tensor, data: DataConfig, short: int) -> Tensor:
    """Resize frames to a short side, or squash them to a square, [T, 3, H', W'].

    Pillow resizes, as in those libraries: torchvision's result differs by up to 9 grey levels.
    """
    height, width = frames.shape[2:]
    to = _resized_size(width, height, data, short)
    filters: Any = Image.Resampling
    resample = filters[data.interpolation.upper()]
    rows = frames.permute(0, 2, 3, 1).contiguous().numpy()
    resized = [np.asarray(Image.fromarray(row).resize(to, resample)) for row in rows]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def _resized_size(width: int, height: int, data: DataConfig, short: int) -> tuple[int, int]:
    """Return the (width, height) of a whole picture that is resized to a short side."""
    if data.resize == "squash":
        return short, short
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short
