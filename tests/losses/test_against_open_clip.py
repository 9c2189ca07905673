"""Contrastive losses against those of open_clip, in one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xray.losses.contrastive import info_nce, sigmoid_loss

open_clip_loss = pytest.importorskip("open_clip.loss")

BATCH, WIDTH = 24, 16
# The sums are in another order, so rounding differs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def leaves(dtype: torch.dtype, count: int) -> list[Tensor]:
    """Make features of images and texts, [B, D] normalised, a scale and, for count 4, a bias."""
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(2, BATCH, WIDTH, dtype=torch.float64), dim=-1)
    given = [images, texts, torch.tensor(14.3), torch.tensor(-9.5)][:count]
    return [x.to(dtype).requires_grad_() for x in given]


def loss_and_gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("ours", "theirs", "count"), [(info_nce, "ClipLoss", 3), (sigmoid_loss, "SigLipLoss", 4)]
)
def test_losses_and_gradients_equal_open_clip(
    ours: Callable[..., Tensor], theirs: str, count: int, dtype: torch.dtype
) -> None:
    actual = loss_and_gradients(ours, leaves(dtype, count))
    expected = loss_and_gradients(getattr(open_clip_loss, theirs)(), leaves(dtype, count))
    limit = TOLERANCE[dtype]
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=limit, atol=limit)
