"""Random unit vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def unit(*shape: int) -> torch.Tensor:
    """Draw unit vectors; the seed depends on the shape."""
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))), dim=-1
    )
