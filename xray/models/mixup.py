"""mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) within a batch of images or clips."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mix(pixels: Tensor, mixup: float, cutmix: float, views: int = 1) -> tuple[Tensor, Tensor]:
    """Mix each row of pixels [B, T, 3, H, W] with the one `views` before, equally in all frames.

    views: rows that follow each other and show the same sample; they are mixed with another one.
    mixup, cutmix: parameter a of the Beta(a, a) distribution of the mixing ratio; 0 = off. If both
    are on, one of them is drawn per call. Random numbers come from torch's CPU generator, which the
    trainer seeds for each micro-batch. Returns the pixels and each row's own share of them, [].
    """
    cut = cutmix > 0 and (mixup == 0 or bool(torch.rand(()) < 0.5))
    alpha = cutmix if cut else mixup
    # not validated: `xray plan` runs this with tensors that have no values
    share = float(torch.distributions.Beta(alpha, alpha, validate_args=False).sample())
    other = pixels.roll(views, 0)
    if not cut:
        return share * pixels + (1 - share) * other, pixels.new_full((), share)
    height, width = pixels.shape[-2:]
    h, w = (round(side * math.sqrt(1 - share)) for side in (height, width))
    top, left = (int(torch.randint(n, ())) for n in (height - h + 1, width - w + 1))
    mixed = pixels.clone()
    mixed[..., top : top + h, left : left + w] = other[..., top : top + h, left : left + w]
    return mixed, pixels.new_full((), 1 - h * w / (height * width))
