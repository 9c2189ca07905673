"""Reconstruction loss and InfoNCE on small examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xray.losses.contrastive import info_nce
from xray.losses.reconstruction import masked_patch_mse


def test_masked_mse_averages_over_masked_patches_only() -> None:
    predictions, targets = torch.rand(2, 6, 4), torch.rand(2, 6, 4)
    mask = torch.tensor([[1.0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]])
    expected = torch.stack(
        [(predictions[b, i] - targets[b, i]).square().mean() for b, i in ((0, 0), (0, 3), (1, 1))]
    ).mean()
    assert torch.allclose(masked_patch_mse(predictions, targets, mask), expected)


def test_info_nce_equals_its_formula() -> None:
    a = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)
    b = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)
    logits = 10 * a @ b.t()
    rows = -(logits.diag() - logits.logsumexp(1)).mean()
    columns = -(logits.diag() - logits.logsumexp(0)).mean()
    assert torch.allclose(info_nce(a, b, 10.0), (rows + columns) / 2, atol=1e-12)
