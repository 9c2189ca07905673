"""Reconstruction loss and InfoNCE on small examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xray.losses.contrastive import contrast, info_nce
from xray.losses.reconstruction import masked_patch_mse


def test_masked_mse_compares_each_frame_with_the_target() -> None:
    predictions, targets = torch.rand(2, 3, 8), torch.rand(2, 3, 4)
    losses = masked_patch_mse(predictions, targets)
    assert losses.shape == (2,)
    for sample, loss in enumerate(losses):
        errors = [
            (predictions[sample, patch, 4 * frame + value] - targets[sample, patch, value]) ** 2
            for patch in range(3)
            for frame in range(2)
            for value in range(4)
        ]
        assert torch.allclose(loss, torch.stack(errors).mean())


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
