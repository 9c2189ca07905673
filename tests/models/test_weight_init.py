"""Tests of the backbone's initial weights and positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from plain_vit import mae_table
from torch import nn

from xray.errors import ConfigError
from xray.models import ModelConfig, VisionBackbone
from xray.models.timm_vit import sincos_positions


def test_positions_of_an_image_equal_the_first_slot_of_a_clip() -> None:
    image, clip = sincos_positions((1, 4, 4), 32), sincos_positions((3, 4, 4), 32)
    assert torch.equal(image, clip[:16])
    assert len({tuple(row.tolist()) for row in clip}) == 48


def reference_embedding(first: int, second: int, width: int) -> list[float]:
    """Return sines, then cosines, of a place times 10000^(-k / (D/4)); then of the other."""
    rates = [10000 ** (-k / (width / 4)) for k in range(width // 4)]
    return [f(i * rate) for i in (first, second) for f in (math.sin, math.cos) for rate in rates]


@pytest.mark.parametrize(("side", "width"), [(14, 512), (7, 64)])
def test_positions_are_those_of_mae(side: int, width: int) -> None:
    ours = sincos_positions((1, side, side), width).double().numpy()
    expected = mae_table(side, width)
    assert np.abs(ours - expected).max() < 2e-6
    older = sincos_positions((1, side, side), width, rows_first=True).double().numpy()
    assert np.abs(older - np.roll(expected, width // 2, axis=1)).max() < 2e-6
    assert np.abs(older - expected).max() > 0.5


@pytest.mark.parametrize("sincos", ["auto", "columns", "rows"])
def test_position_table_starts_with_sine_cosine_embeddings(sincos: Any) -> None:
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        kwargs={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        sincos=sincos,
    )
    vit = VisionBackbone(config, resolution=(24, 40), frames=4)
    table = vit.pos_embed.detach()[0, 1:].reshape(3, 5, 32)
    for row, column in ((0, 0), (2, 1), (1, 4)):
        places = (row, column) if sincos == "rows" else (column, row)
        expected = torch.tensor(reference_embedding(*places, 32))
        torch.testing.assert_close(table[row, column], expected, atol=1e-6, rtol=0)
    assert vit.pos_embed.requires_grad  # training changes them
    assert vit.pos_temporal is not None and vit.pos_temporal.abs().max() < 0.1


def test_width_that_is_not_a_multiple_of_4_is_rejected() -> None:
    kwargs = {"patch_size": 8, "embed_dim": 54, "depth": 2, "num_heads": 3}
    with pytest.raises(ConfigError, match="embed_dim=54 must be a multiple of 4"):
        VisionBackbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs), 32)


@pytest.mark.parametrize("width", [48, 192])
def test_initial_weights_are_xavier_uniform(width: int) -> None:
    kwargs = {"patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 3}
    vit = VisionBackbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs), 32)
    maps = [module.weight for module in vit.blocks.modules() if isinstance(module, nn.Linear)]
    assert len(maps) == 8
    stem = vit.patch_embed.proj.weight.sum(dim=2).flatten(1)  # the kernel for an image
    for weight in [*maps, stem]:
        bound = math.sqrt(6 / sum(weight.shape))  # outputs + inputs
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_weight_init_keyword_selects_timms_initialisation() -> None:
    kwargs = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "weight_init": "jax"}
    torch.manual_seed(0)
    vit = VisionBackbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs), 32)
    torch.manual_seed(0)
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **kwargs)
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, reference.blocks[1].mlp.fc1.weight)
