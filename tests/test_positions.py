"""Positions that tokens start with."""

from __future__ import annotations

import math

import torch

from xray.models import ModelConfig, VisionBackbone
from xray.models.positions import sincos_positions


def test_image_and_first_slot_of_a_clip_agree() -> None:
    image, clip = sincos_positions((1, 4, 4), 32), sincos_positions((3, 4, 4), 32)
    assert torch.equal(image, clip[:16])
    assert len({tuple(row.tolist()) for row in clip}) == 48


def by_hand(row: int, column: int, width: int) -> list[float]:
    """Sines, then cosines, of the row times 10000^(-k / (D/4)); then of the column."""
    rates = [10000 ** (-k / (width / 4)) for k in range(width // 4)]
    return [
        f(place * rate) for place in (row, column) for f in (math.sin, math.cos) for rate in rates
    ]


def test_patches_start_where_they_lie() -> None:
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        kwargs={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    )
    vit = VisionBackbone(config, resolution=(24, 40), frames=4)
    table = vit.pos_embed.detach()[0, 1:].reshape(3, 5, 32)
    for row, column in ((0, 0), (2, 1), (1, 4)):
        expected = torch.tensor(by_hand(row, column, 32))
        torch.testing.assert_close(table[row, column], expected, atol=1e-6, rtol=0)
    assert vit.pos_embed.requires_grad  # they are learned from there
    assert vit.pos_temporal is not None and vit.pos_temporal.abs().max() < 0.1
