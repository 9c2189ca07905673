"""Reconstruction loss and InfoNCE on small examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xray.losses.contrastive import contrast, info_nce
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


def test_keys_of_an_id_below_0_are_left_out() -> None:
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1).requires_grad_()
    keys = F.normalize(torch.randn(9, 8, dtype=torch.float64), dim=-1).requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    mine, ids = torch.arange(5), torch.tensor([0, 1, 2, 3, 4, 9, -1, 9, -1])
    kept = ids >= 0
    inputs = queries, keys, scale
    losses = (
        contrast(queries, keys, scale, mine, ids),
        contrast(queries, keys[kept], scale, mine, ids[kept]),
    )
    one, two = ((loss, *torch.autograd.grad(loss, inputs)) for loss in losses)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert not one[2][~kept].any() and one[2][kept].any(dim=1).all()
