"""The stem over tubelets: one Conv3d for images and clips."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray.errors import ConfigError


class Geometry(NamedTuple):
    """How pixels are cut into tokens: patch (height, width), and frames per time slot."""

    patch: tuple[int, int]
    frames: int

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) tokens; raises ConfigError for sides that are not whole patches."""
        for side, patch in zip((height, width), self.patch, strict=True):
            if side % patch:
                raise ConfigError(
                    f"{side} pixels (data.resolution) are not a multiple of the patch size "
                    f"{patch}: use {max(1, side // patch) * patch}"
                )
        return -(-frames // self.frames), height // self.patch[0], width // self.patch[1]


class TubeletConv(nn.Conv3d):
    """[B, T, 3, H, W] -> [B, n, D], t-major; an image (T = 1) is its own repeated frame.

    A repeated frame meets the sum of the temporal kernels, so an image costs one 2-d convolution,
    and with kernels inflated by averaging gives exactly what timm's stem gives.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1] == 1:
            folded = self.weight.sum(dim=2)
            patches = F.conv2d(pixels[:, 0], folded, self.bias, self.stride[1:])
            return patches.flatten(2).transpose(1, 2)
        return super().forward(pixels.transpose(1, 2)).flatten(2).transpose(1, 2)


class TubeletEmbed(nn.Module):
    """timm's `patch_embed` with a tubelet stem that starts as the average of its kernels."""

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
        return self.norm(self.proj(pixels))


def inflate(kernel: Tensor, tubelet: int) -> Tensor:
    """[D, 3, p, p] -> [D, 3, tubelet, p, p] by averaging: a still clip gives what an image does."""
    return (kernel / tubelet)[:, :, None].expand(-1, -1, tubelet, -1, -1).contiguous()


def whole_tubelets(pixels: Tensor, tubelet: int) -> Tensor:
    """Repeat the last frame until [B, T, 3, H, W] is whole tubelets; an image becomes one."""
    missing = -pixels.shape[1] % tubelet
    if not missing:
        return pixels
    return torch.cat([pixels, pixels[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
