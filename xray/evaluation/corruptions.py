"""Common corruptions at five severities (ImageNet-C, 1903.12261), and changes of aspect ratio.

These are the eight of the fifteen corruptions that numeric constants define. Glass, motion and zoom
blur, snow, frost, fog and elastic are not computed: they need images of frost, ImageMagick's motion
blur or a plasma fractal. They can be read from ImageNet-C's own files (`corruption_folders`). As in
ImageNet-C, images are corrupted after they are cropped and resized. The constants are for 224
pixels, so a disc or a block covers more of a smaller image.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_pipelines.decode.images import decode_image

if TYPE_CHECKING:  # the settings of a suite list CORRUPTIONS, and are read without torch
    from torch import Tensor

Rng = np.random.Generator
Array = np.ndarray  # [T, 3, H, W] float in [0, 1]

NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
SHOT = (60, 25, 12, 5, 3)
IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)
DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))  # radius, sigma of the blur
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
JPEG = (25, 18, 15, 10, 7)


def gaussian_noise(x: Array, severity: int, rng: Rng) -> Array:
    """Add noise from N(0, sd)."""
    return x + rng.normal(scale=NOISE[severity - 1], size=x.shape)


def shot_noise(x: Array, severity: int, rng: Rng) -> Array:
    """Draw from Poisson(c x) / c."""
    photons = SHOT[severity - 1]
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Array, severity: int, rng: Rng) -> Array:
    """Set a fraction of the values to 0 or 1 with equal probability."""
    drawn, share = rng.random(x.shape), IMPULSE[severity - 1]
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, x))


def defocus_blur(x: Array, severity: int, rng: Rng) -> Array:
    """Average over a disc."""
    import torch
    import torch.nn.functional as F

    kernel = torch.from_numpy(disc(*DEFOCUS[severity - 1]))[None, None]
    pad = kernel.shape[-1] // 2
    planes = torch.from_numpy(x).flatten(0, 1)[:, None]
    planes = F.conv2d(F.pad(planes, (pad,) * 4, mode="reflect"), kernel)
    return planes[:, 0].numpy().reshape(x.shape)


def disc(radius: int, sigma: float) -> Array:
    """Make a disc that sums to 1, blurred by a Gaussian of 3 x 3 taps, 5 x 5 above radius 8."""
    half, reach = max(8, radius), 1 if radius <= 8 else 2
    across = np.arange(-half, half + 1)
    flat = (across[:, None] ** 2 + across**2 <= radius**2).astype(np.float64)
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (0, 1):
        flat = np.apply_along_axis(np.convolve, axis, flat, taps, mode="same")
    return flat / flat.sum()


def brightness(x: Array, severity: int, rng: Rng) -> Array:
    """Raise the value of HSV; hue and saturation stay the same."""
    value = x.max(axis=1, keepdims=True)
    raised = (value + BRIGHTNESS[severity - 1]).clip(0, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-12), raised)


def contrast(x: Array, severity: int, rng: Rng) -> Array:
    """Scale the values towards each channel's mean."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    return (x - mean) * CONTRAST[severity - 1] + mean


def pixelate(frame: Image.Image, severity: int) -> Image.Image:
    """Downscale to a fraction of the sides and upscale again, with a box filter."""
    size = tuple(max(1, int(side * PIXELATE[severity - 1])) for side in frame.size)
    small = frame.resize(size, Image.Resampling.BOX)  # type: ignore[arg-type]
    return small.resize(frame.size, Image.Resampling.BOX)


def jpeg_compression(frame: Image.Image, severity: int) -> Image.Image:
    """Encode as JPEG and decode."""
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=JPEG[severity - 1])
    return decode_image(buffer.getvalue())


ON_VALUES: dict[str, Callable[[Array, int, Rng], Array]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "brightness": brightness,
    "contrast": contrast,
}
ON_FRAMES = {"pixelate": pixelate, "jpeg_compression": jpeg_compression}
CORRUPTIONS = (*ON_VALUES, *ON_FRAMES)
SEVERITIES = (1, 2, 3, 4, 5)
# The corruptions of ImageNet-C's folders: the fifteen of its mean, and four more for validation.
IMAGENET_C = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


def corrupt(name: str, severity: int, pixels: Tensor, rng: Rng) -> Tensor:
    """Corrupt [T, 3, H, W] uint8; severity 1 to 5."""
    import torch

    if name in ON_FRAMES:
        frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels]
        changed = [np.array(ON_FRAMES[name](frame, severity)) for frame in frames]
        return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()
    values = ON_VALUES[name](pixels.numpy() / 255.0, severity, rng)
    return torch.from_numpy((values.clip(0, 1) * 255).astype(np.uint8))


def stretch(ratio: float, pixels: Tensor, rng: Rng) -> Tensor:
    """Stretch the width of [T, 3, H, W] uint8 by `ratio` relative to the height, and crop."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    height, width = pixels.shape[-2:]
    h, w = (height, round(width / ratio)) if ratio > 1 else (round(height * ratio), width)
    cropped = tv.center_crop(pixels, [h, w])
    return tv.resize(cropped, [height, width], InterpolationMode.BICUBIC, antialias=True)
