"""Tag losses over classes that are divided over ranks, against the head on one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from child_process import SUPPORT, python
from sharded_ranks import CASES, SAMPLES, inputs, reduced
from torch import Tensor


def whole(name: str, world: int) -> list[Tensor]:
    """Losses, likeliest classes and gradients of the whole head, in float64.

    The gradients are those that a run has: of the features, that of their rank's loss; of the head,
    that of the mean of the ranks' losses.
    """
    given, loss = inputs(world, torch.float64), CASES[name]
    features, weight, bias = (given[n].requires_grad_() for n in ("features", "weight", "bias"))
    logits = features @ weight.t() + bias
    losses, top = loss.from_logits(logits, given["tags"], given["targets"])
    total = torch.stack([reduced(part) for part in losses.split(SAMPLES)]).sum()
    grads = torch.autograd.grad(total, [features, weight, bias])
    return [losses.detach(), top, grads[0], grads[1] / world, grads[2] / world]


@pytest.mark.parametrize(
    ("world", "dtype"), [(2, "float64"), (2, "float32"), (3, "float64"), (5, "float32")]
)
def test_the_shards_of_a_head_equal_the_whole_head(world: int, dtype: str, tmp_path: Path) -> None:
    """11 classes do not divide over the ranks."""
    done = python(str(SUPPORT / "sharded_ranks.py"), str(world), dtype, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    for name in CASES:
        parts = [torch.cat(part) for part in zip(*(rank[name] for rank in ranks), strict=True)]
        for found, expected in zip(parts, whole(name, world), strict=True):
            assert torch.allclose(found.to(expected.dtype), expected, tolerance, tolerance), name
