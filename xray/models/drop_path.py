"""Stochastic depth (1603.09382) whose probability is no constant of compiled code."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


class DropPath(timm.layers.DropPath):
    """Stochastic depth: in training, sets a residual branch of a sample to zero, at random.

    In eager mode it is timm's. Dynamo makes timm's probability a constant and would compile each
    block anew, as the probability rises from block to block; compiled code reads it from a buffer.
    """

    keep_prob: Tensor  # 0-d; in float64 the draws equal those with timm's Python number

    def __init__(self, drop_prob: float) -> None:
        super().__init__(drop_prob)
        keep_prob = torch.tensor(1 - drop_prob, dtype=torch.float64)
        self.register_buffer("keep_prob", keep_prob, persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> DropPath:
        super()._apply(*args, **kwargs)
        self.keep_prob.fill_(1 - self.drop_prob)  # which `to_empty` leaves uninitialised
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Drop the branch x, [B, ...], of some samples and scale it up for the others."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        if not self.training:
            return x
        kept = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(self.keep_prob)
        return x * kept.div_(self.keep_prob)


def replace_drop_path(vit: VisionTransformer | Eva) -> None:
    """Replace timm's stochastic depth in all blocks.

    The first block, whose probability is 0, gets it too, so that it shares the others' graphs.
    """
    for block in vit.blocks:
        for name in ("drop_path1", "drop_path2"):
            drop_prob = getattr(getattr(block, name), "drop_prob", 0.0)
            setattr(block, name, DropPath(drop_prob))
