"""Decoded media to `[T, 3, S, S]` uint8 tensors, with randomness handed in by the caller."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from data_pipelines.decode import decode_clip, decode_image, media_of
from data_pipelines.shards import Sample
from xray.config import DataConfig

ASPECT = (3 / 4, 4 / 3)  # of the random crop, as in Inception and every recipe since
Box = tuple[int, int, int, int]  # left, top, width, height


def random_crop(width: int, height: int, scale: list[float], rng: np.random.Generator) -> Box:
    """A random crop's box by area and aspect; the centre crop when ten tries do not fit."""
    area = width * height
    for _ in range(10):
        target = area * rng.uniform(scale[0], scale[1])
        ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    return center_crop(width, height)


def center_crop(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def pick_frames(total: int, frames: int, rng: np.random.Generator | None) -> np.ndarray:
    """`frames` indices spread over a clip: one per equal segment, its middle or a random place."""
    offset = rng.random(frames) if rng is not None else np.full(frames, 0.5)
    return ((np.arange(frames) + offset) * total / frames).astype(np.int64).clip(0, total - 1)


def load_pixels(sample: Sample, data: DataConfig, rng: np.random.Generator | None) -> Tensor:
    """Decode, crop, resize and flip one sample to [T, 3, S, S] uint8; T = 1 for an image.

    Without `rng` the centre crop and the middle frames are taken, as in evaluation.
    """
    media = media_of(sample.files, sample.modality)
    size = sample.resolution
    if sample.modality == "image":
        image = decode_image(media, least=size if rng is None else 2 * size)
        box = _box(image.width, image.height, data, rng)
        pixels = resize_image(image, box, size)
    else:
        clip = decode_clip(media, lambda total: pick_frames(total, sample.frames, rng))
        left, top, w, h = _box(clip.shape[2], clip.shape[1], data, rng)
        frames = torch.from_numpy(clip).permute(0, 3, 1, 2)  # [T, 3, H, W]
        pixels = tv.resized_crop(
            frames, top, left, h, w, [size, size], InterpolationMode.BICUBIC, antialias=True
        )
    if rng is not None and data.flip and rng.random() < 0.5:
        pixels = pixels.flip(-1)
    return pixels.contiguous()


def resize_image(image: Image.Image, box: Box, size: int) -> Tensor:
    """Crop and resize in one bicubic pass: [1, 3, size, size] uint8."""
    left, top, w, h = box
    resized = image.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h)
    )
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]


def _box(width: int, height: int, data: DataConfig, rng: np.random.Generator | None) -> Box:
    if rng is None:
        return center_crop(width, height)
    return random_crop(width, height, data.crop_scale, rng)
