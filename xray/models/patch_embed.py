"""Patches of images and clips, and the stem that embeds them.

A patch is a tubelet of `tubelet x p x p` pixels in (frame, row, column, channel) order.
"""

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
    """Linear map of tubelets with the parameters of a Conv3d, [B, T, 3, H, W] -> [B, n, D].

    An image (T = 1) is treated as a tubelet of repeated frames, whose kernels are summed over time.
    With kernels from `inflate` it equals timm's stem.

    The patches are multiplied as a matrix: kernel and stride are equal, and for such kernels
    cuDNN's 3-d convolutions in bf16 are slow or missing (pytorch#174051, transformers#45750). On a
    CPU, whole inputs pass through torch's convolution, which equals timm's bit for bit.
    """

    def forward(self, pixels: Tensor, index: Tensor | None = None) -> Tensor:
        """Embed all patches, or those at an index [B, m]: [B, T, 3, H, W] -> [B, n or m, D]."""
        image = pixels.shape[1] == 1
        weight = self.weight.sum(dim=2, keepdim=True) if image else self.weight
        if index is None and pixels.device.type == "cpu":
            if image:
                tokens = F.conv2d(pixels[:, 0], weight[:, :, 0], self.bias, self.stride[1:])
            else:
                tokens = super().forward(pixels.transpose(1, 2))
            return tokens.flatten(2).transpose(1, 2)
        tubelet, *patch = weight.shape[2:]
        patches = patchify(pixels, (patch[0], patch[1]), tubelet, index)
        return F.linear(patches, weight.permute(0, 2, 3, 4, 1).flatten(1), self.bias)


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

    def forward(self, pixels: Tensor, index: Tensor | None = None) -> Tensor:
        """Embed and normalise all patches, or those at an index [B, m], -> [B, n or m, D]."""
        return self.norm(self.proj(pixels, index))


def inflate(kernel: Tensor, tubelet: int) -> Tensor:
    """Repeat a 2-d kernel over time and divide it: [D, 3, p, p] -> [D, 3, tubelet, p, p]."""
    return (kernel / tubelet)[:, :, None].expand(-1, -1, tubelet, -1, -1).contiguous()


def whole_tubelets(pixels: Tensor, tubelet: int) -> Tensor:
    """Repeat the last frame until T is a multiple of `tubelet`, [B, T, 3, H, W]."""
    missing = -pixels.shape[1] % tubelet
    if not missing:
        return pixels
    return torch.cat([pixels, pixels[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)


def patchify(
    pixels: Tensor, patch: tuple[int, int], tubelet: int, index: Tensor | None = None
) -> Tensor:
    """Cut pixels into patches, [B, t*tubelet, 3, H, W] -> [B, n, tubelet*p*p*3], slot by slot.

    index: [B, m] long, the patches to cut; None for all n.
    """
    B, T, C, H, W = pixels.shape
    (p, r), t, h, w = patch, T // tubelet, H // patch[0], W // patch[1]
    x = pixels.reshape(B, t, tubelet, C, h, p, w, r).permute(0, 1, 4, 6, 2, 5, 7, 3)
    if index is None:
        return x.reshape(B, t * h * w, tubelet * p * r * C)
    sample = torch.arange(B, device=index.device)[:, None]
    return x[sample, index // (h * w), index // w % h, index % w].flatten(2)


def unpatchify(patches: Tensor, grid: tuple[int, int, int], patch: tuple[int, int]) -> Tensor:
    """Invert `patchify`, [B, n, tubelet*p*p*3] -> [B, T, 3, H, W]."""
    (t, h, w), (p, r) = grid, patch
    B, _, size = patches.shape
    tubelet = size // (3 * p * r)
    x = patches.reshape(B, t, h, w, tubelet, p, r, 3).permute(0, 1, 4, 7, 2, 5, 3, 6)
    return x.reshape(B, t * tubelet, 3, h * p, w * r)
