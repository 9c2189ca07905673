"""Masked auto-encoding around the backbone: masks, patch targets and the light decoder.

`ids_restore` undoes the shuffle: visible tokens followed by mask tokens, gathered by `ids_restore`,
are in the order of the patches. An image is treated as a clip of repeated frames.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from xray.models.timm_vit import sincos_positions


def visible_tokens(tokens: int, mask_ratio: float, tube: bool = False) -> int:
    """Return the number of visible tokens, at least one, rounded down as in MAE.

    For a tube mask, the number of removed tokens is rounded down, as in VideoMAE.
    """
    if tube:
        return max(1, tokens - math.floor(mask_ratio * tokens + 1e-6))
    return max(1, math.floor((1 - mask_ratio) * tokens + 1e-6))


class Masking(NamedTuple):
    """Mask settings: images are masked at random, clips in tubes or at random."""

    mask_ratio: float  # share of tokens removed from an image
    video_mask_ratio: float  # share of tokens removed from a clip
    video_mask: str  # "tube": the same positions in every time slot; "random": any token

    def noise_size(self, grid: tuple[int, int, int]) -> int:
        """Return the number of random numbers per sample that `draw` takes."""
        t, h, w = grid
        return h * w if self.video_mask == "tube" else t * h * w

    def draw(
        self, noise: Tensor, grid: tuple[int, int, int], frames: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `make_mask`'s masks of images (frames = 1) or clips from noise [B, noise_size]."""
        return make_mask(noise, *self.kept(grid, frames))

    def kept(self, grid: tuple[int, int, int], frames: int) -> tuple[int, int]:
        """Return (visible positions, time slots that share them)."""
        clip = frames > 1
        tube = clip and self.video_mask == "tube"
        ratio = self.video_mask_ratio if clip else self.mask_ratio
        return visible_tokens(self.noise_size(grid), ratio, tube), grid[0] if tube else 1


def make_mask(noise: Tensor, kept: int, slots: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Make masks from noise [B, positions]: the `kept` positions with the lowest stay visible.

    slots: number of time slots that share the mask (tubes); 1 if positions are all tokens. Returns
    visible [B, m] and removed [B, n - m] (patch indices, slot by slot), ids_restore [B, n].
    """
    spatial = noise.shape[1]
    shuffle = noise.argsort(dim=1, stable=True)
    offsets = torch.arange(slots, device=noise.device)[None, :, None] * spatial
    visible = (shuffle[:, None, :kept] + offsets).flatten(1)  # the same positions in each slot
    removed = (shuffle[:, None, kept:] + offsets).flatten(1)
    return visible, removed, torch.cat([visible, removed], dim=1).argsort(dim=1)


def patch_statistics(
    patches: Tensor, frames: int = 1, per_channel: bool = False
) -> tuple[Tensor, Tensor]:
    """Return mean and (unbiased) standard deviation of patches [..., P], which broadcast with them.

    They are those of all values of a patch, as in MAE, or of each colour channel, as in VideoMAE
    (2203.12602). frames: number of equal frames that a patch stands for, whose values the variance
    counts.
    """
    values = patches.unflatten(-1, (-1, 3)) if per_channel else patches[..., None]
    mean = values.mean(dim=-2, keepdim=True)
    squares = (values - mean).square().sum(dim=-2, keepdim=True)
    variance = frames * squares / (frames * values.shape[-2] - 1)
    # the small numbers of both authors' code
    deviation = variance.sqrt() + 1e-6 if per_channel else (variance + 1e-6).sqrt()
    mean, deviation = (x.expand_as(values).flatten(-2) for x in (mean, deviation))
    return mean, deviation


def normalize_patches(patches: Tensor, frames: int = 1, per_channel: bool = False) -> Tensor:
    """Normalise patches [..., P] to zero mean and unit variance; see `patch_statistics`."""
    mean, deviation = patch_statistics(patches, frames, per_channel)
    return (patches - mean) / deviation


class MaeDecoder(nn.Module):
    """Decoder that predicts patches from the visible tokens (MAE, 2111.06377).

    width: of the encoder's tokens. outputs: values predicted per patch. dim, depth, heads: width,
    blocks and attention heads of the decoder. rows_first: see `sincos_positions`.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        dim: int,
        depth: int,
        heads: int,
        rows_first: bool = False,
    ) -> None:
        super().__init__()
        self.rows_first = rows_first
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        cls: Tensor,
        visible: Tensor,
        ids_restore: Tensor,
        grid: tuple[int, int, int],
        index: Tensor | None = None,
    ) -> Tensor:
        """Predict patches: cls [B, D] and visible [B, m, D] -> [B, n or k, outputs].

        ids_restore: [B, n] from `make_mask`. grid: the patch grid (t, h, w). index: [B, k], the
        patches to predict; None for all n.
        """
        x = self.embed(visible)
        B, m, dim = x.shape
        hidden = self.mask_token.expand(B, ids_restore.shape[1] - m, -1).to(x.dtype)
        x = torch.cat([x, hidden], dim=1).gather(1, ids_restore[..., None].expand(-1, -1, dim))
        x = x + sincos_positions(grid, dim, x.device, self.rows_first).to(x.dtype)
        x = torch.cat([self.embed(cls)[:, None], x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = x[:, 1:]
        if index is not None:
            x = x.gather(1, index[..., None].expand(-1, -1, dim))
        return self.predict(self.norm(x))
