"""Stem over tubelets: one Conv3d for images and clips."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray.errors import ConfigError


class Geometry(NamedTuple):
    """Size of a patch token in pixels: patch (height, width) and frames per time slot."""

    patch: tuple[int, int]
    frames: int

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the token grid (t, h, w) of a clip; height and width in pixels.

        Raises ConfigError if a side is not a multiple of the patch size.
        """
        for side, patch in zip((height, width), self.patch, strict=True):
            if side % patch:
                raise ConfigError(
                    f"{side} pixels (data.resolution) are not a multiple of the patch size "
                    f"{patch}: set data.resolution={max(1, side // patch) * patch}"
                )
        return -(-frames // self.frames), height // self.patch[0], width // self.patch[1]


class TubeletConv(nn.Conv3d):
    """Convolution over tubelets, [B, T, 3, H, W] -> [B, n, D], time slot by slot.

    An image (T = 1) is treated as a tubelet of repeated frames: one 2-d convolution with the
    kernels summed over time. With kernels from `inflate` it equals timm's stem.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed pixels, [B, T, 3, H, W] -> [B, n, D]."""
        if pixels.shape[1] == 1:
            folded = self.weight.sum(dim=2)
            patches = F.conv2d(pixels[:, 0], folded, self.bias, self.stride[1:])
            return patches.flatten(2).transpose(1, 2)
        return super().forward(pixels.transpose(1, 2)).flatten(2).transpose(1, 2)


class TubeletEmbed(nn.Module):
    """Replacement of timm's `patch_embed` for tubelets, initialised from timm's 2-d kernels."""

    def __init__(self, proj: nn.Conv2d, norm: nn.Module, tubelet: int) -> None:
        super().__init__()
        height, width = proj.weight.shape[-2:]
        size = (tubelet, height, width)
        bias = proj.bias is not None
        self.proj = TubeletConv(3, proj.out_channels, kernel_size=size, stride=size, bias=bias)
        self.norm = norm
        with torch.no_grad():
            self.proj.weight.copy_(inflate(proj.weight, tubelet))
            if self.proj.bias is not None and proj.bias is not None:
                self.proj.bias.copy_(proj.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed and normalise pixels, [B, T, 3, H, W] -> [B, n, D]."""
        return self.norm(self.proj(pixels))


def inflate(kernel: Tensor, tubelet: int) -> Tensor:
    """Repeat a 2-d kernel over time and divide it: [D, 3, p, p] -> [D, 3, tubelet, p, p]."""
    return (kernel / tubelet)[:, :, None].expand(-1, -1, tubelet, -1, -1).contiguous()


def whole_tubelets(pixels: Tensor, tubelet: int) -> Tensor:
    """Repeat the last frame until T is a multiple of `tubelet`, [B, T, 3, H, W]."""
    missing = -pixels.shape[1] % tubelet
    if not missing:
        return pixels
    return torch.cat([pixels, pixels[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
