"""Random removal of image tokens in training, as FLIP (2212.00794), PatchDropout (2208.07220)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_places(grid: tuple[int, int, int], ratio: float, per_slot: bool) -> tuple[int, int]:
    """Return (groups drawn separately, patch tokens kept in each).

    A group is one time slot with `per_slot`, otherwise the whole grid.
    """
    t, h, w = grid
    slots, size = (t, h * w) if per_slot else (1, t * h * w)
    return slots, max(1, round(size * (1 - ratio)))


def draw_visible(
    grid: tuple[int, int, int], batch: int, ratio: float, per_slot: bool, device: torch.device
) -> Tensor:
    """Draw the indices of the kept patch tokens, [B, m], separately for each sample.

    per_slot: keep the same number in each time slot, and sort by slot (for `video: frames`).
    """
    slots, kept = visible_places(grid, ratio, per_slot)
    size = math.prod(grid) // slots
    index = torch.rand(batch, slots, size, device=device).topk(kept, dim=2).indices
    starts = size * torch.arange(slots, device=device)[:, None]
    return (index + starts).flatten(1)
