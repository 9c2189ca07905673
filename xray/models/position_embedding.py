"""Sine-cosine position embeddings (1706.03762) in two dimensions, as in MAE (2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos(positions: Tensor, width: int) -> Tensor:
    """Embed positions, [N] -> [N, width]: sines, then cosines."""
    rates = torch.arange(width // 2, dtype=torch.float32, device=positions.device)
    rates = 10000 ** (-rates / (width / 2))
    angles = positions[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_positions(
    grid: tuple[int, int, int], width: int, device: torch.device | None = None
) -> Tensor:
    """Embed the positions of a grid (t, h, w), [t*h*w, width]; width is a multiple of 4.

    Half of the channels encode rows, half columns. A time embedding, zero in the first slot, is
    added to all channels: an image equals a clip's first slot.
    """
    t, h, w = grid
    ticks = torch.arange(max(grid), device=device)
    rows = sincos(ticks[:h], width // 2).repeat_interleave(w, dim=0)
    columns = sincos(ticks[:w], width // 2).repeat(h, 1)
    time = sincos(ticks[:t], width) - sincos(ticks[:1], width)
    return (torch.cat([rows, columns], dim=1)[None] + time[:, None]).flatten(0, 1)
