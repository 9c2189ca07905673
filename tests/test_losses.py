from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from xray.losses import info_nce, masked_patch_mse, soft_cross_entropy, tag_entropy


def test_masked_mse_counts_removed_patches_only() -> None:
    predictions, targets = torch.rand(2, 6, 4), torch.rand(2, 6, 4)
    mask = torch.tensor([[1.0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]])
    expected = torch.stack(
        [(predictions[b, i] - targets[b, i]).square().mean() for b, i in ((0, 0), (0, 3), (1, 1))]
    ).mean()
    assert torch.allclose(masked_patch_mse(predictions, targets, mask), expected)


def test_soft_cross_entropy_value_and_gradient() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    tags = torch.tensor([[0, 3, -1], [6, -1, -1], [1, 2, 5]])
    targets = torch.zeros(3, 7, dtype=torch.float64)
    for row, ids in enumerate(tags.tolist()):
        own = [i for i in ids if i >= 0]
        targets[row, own] = 1 / len(own)
    loss = soft_cross_entropy(logits, tags)
    assert torch.allclose(loss, F.cross_entropy(logits, targets), atol=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(grad, (logits.softmax(-1) - targets) / 3, atol=1e-12)


def test_entropy_is_the_floor() -> None:
    tags = torch.tensor([[0, 3, -1]])
    best = torch.full((1, 7), -50.0)
    best[0, [0, 3]] = 0
    assert math.isclose(tag_entropy(tags).item(), math.log(2), rel_tol=1e-6)
    assert math.isclose(soft_cross_entropy(best, tags).item(), math.log(2), rel_tol=1e-6)


def test_info_nce_by_hand() -> None:
    a = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)
    b = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)
    logits = 10 * a @ b.t()
    rows = -(logits.diag() - logits.logsumexp(1)).mean()
    columns = -(logits.diag() - logits.logsumexp(0)).mean()
    assert torch.allclose(info_nce(a, b, 10.0), (rows + columns) / 2, atol=1e-12)
