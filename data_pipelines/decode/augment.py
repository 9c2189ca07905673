"""Augmentation with torchvision's transforms, identical for all frames of a clip.

The random draws are seeded by our generator.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from xray.config import DataConfig

Policy = tuple[tuple[float, ...], tuple[int, ...], float]


def augment(pixels: Tensor, data: DataConfig, rng: np.random.Generator) -> Tensor:
    """Apply the configured flip, colour jitter, RandAugment and random erasing.

    pixels: [T, 3, S, S] uint8; the result has the same shape and type. All random numbers come from
    `rng`, and all frames use the same ones.
    """
    if data.flip and rng.random() < 0.5:
        pixels = pixels.flip(-1)
    policy = _transforms((tuple(data.color_jitter), tuple(data.rand_augment), data.erase))
    if policy:
        with _torch_seeded_by(rng):
            for transform in policy:
                pixels = transform(pixels)
    return pixels


@functools.lru_cache(maxsize=8)
def _transforms(policy: Policy) -> list[v2.Transform]:
    (brightness, contrast, saturation, hue), (operations, magnitude), erase = policy
    transforms: list[v2.Transform] = []
    if any((brightness, contrast, saturation, hue)):
        transforms.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    if operations:
        bilinear = v2.InterpolationMode.BILINEAR
        transforms.append(v2.RandAugment(operations, magnitude, interpolation=bilinear))
    if erase:
        transforms.append(v2.RandomErasing(erase))
    return transforms


@contextmanager
def _torch_seeded_by(rng: np.random.Generator) -> Iterator[None]:
    """Seed torch's global CPU generator, which torchvision draws from; restore it afterwards."""
    generator = torch.default_generator  # torch.manual_seed would seed the GPUs too
    state = generator.get_state()
    generator.manual_seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        generator.set_state(state)
