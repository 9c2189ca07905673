"""Changes of colour and place, the same for all frames of a clip; torchvision's, seeded by ours."""

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
    """Flip, colour jitter, RandAugment and erasing as configured: [T, 3, S, S] uint8 to the same.

    All randomness is drawn from `rng`; one draw serves every frame.
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
    found: list[v2.Transform] = []
    if any((brightness, contrast, saturation, hue)):
        found.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    if operations:
        bilinear = v2.InterpolationMode.BILINEAR
        found.append(v2.RandAugment(operations, magnitude, interpolation=bilinear))
    if erase:
        found.append(v2.RandomErasing(erase))
    return found


@contextmanager
def _torch_seeded_by(rng: np.random.Generator) -> Iterator[None]:
    """torchvision draws from torch's global generator: seed it for a while, then put it back."""
    generator = torch.default_generator  # torch.manual_seed would reach the GPU's as well
    state = generator.get_state()
    generator.manual_seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        generator.set_state(state)
