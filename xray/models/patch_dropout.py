"""Leaving out image tokens in training: FLIP's masking (2212.00794), PatchDropout (2208.07220)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 8  # steps that a rising ratio takes, so that compiled graphs see few shapes


def mask_ratio_at(ratio: float, span: tuple[float, float], until: float, progress: float) -> float:
    """The share left out at a progress: 0 before span, `ratio` after it, 0 again from `until` on.

    Inside the span it rises in LEVELS steps.
    """
    start, end = span
    if progress < start or progress >= until:
        return 0.0
    if progress >= end:
        return ratio
    return ratio * math.floor(LEVELS * (progress - start) / (end - start)) / LEVELS


def visible_places(grid: tuple[int, int, int], ratio: float, per_slot: bool) -> tuple[int, int]:
    """(time slots that are drawn from, patch tokens that stay in each)."""
    t, h, w = grid
    slots, size = (t, h * w) if per_slot else (1, t * h * w)
    return slots, max(1, round(size * (1 - ratio)))


def draw_visible(
    grid: tuple[int, int, int], batch: int, ratio: float, per_slot: bool, device: torch.device
) -> Tensor:
    """Places of the patch tokens that stay, [B, m], drawn for each sample by itself.

    per_slot: the same number in each time slot, slot by slot (`video: frames`).
    """
    slots, kept = visible_places(grid, ratio, per_slot)
    size = math.prod(grid) // slots
    places = torch.rand(batch, slots, size, device=device).topk(kept, dim=2).indices
    starts = size * torch.arange(slots, device=device)[:, None]
    return (places + starts).flatten(1)
