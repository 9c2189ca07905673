"""Input normalisation and the small heads on top of the towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray.config.model import ImageHead, TextHead
from xray.errors import ConfigError


class Normalize(nn.Module):
    """Conversion of uint8 pixels to floats; mean, std: per channel, for pixels in [0, 1]."""

    mean: Tensor  # [3, 1, 1], for pixels in [0, 255]
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise pixels [B, T, 3, H, W], uint8 -> float."""
        # in place: one temporary tensor instead of three
        return pixels.to(self.mean.dtype).sub_(self.mean).div_(self.std)


class Projection(nn.Linear):
    """Linear map into the joint space, [B, width] -> [B, joint]."""

    def __init__(self, width: int, joint: int, bias: bool = False) -> None:
        super().__init__(width, joint, bias=bias)
        nn.init.normal_(self.weight, std=width**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class TextProjection(Projection):
    """Text head of CLIP (2103.00020) in fp32, [B, width] -> [B, joint], not normalised."""

    def forward(self, sentence: Tensor) -> Tensor:
        return super().forward(sentence.float())


class TagHead(nn.Linear):
    """Linear classifier of tags, [B, D] -> [B, V].

    A loss that computes logits in chunks reads the weights inside this forward, because ZeRO 3
    gathers partitioned weights only there. It is passed to `forward` as `work`.
    """

    def __init__(self, width: int, tags: int) -> None:
        super().__init__(width, tags)
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def start(self, bias: Tensor) -> None:
        """Set the bias [V] that training starts from."""
        self.bias.copy_(bias)

    def forward(self, features: Tensor, work: Callable[..., Any] | None = None) -> Any:
        """Return the logits, [B, D] -> [B, V], or the result of work(features, weight, bias)."""
        if work is None:
            return super().forward(features)
        return work(features, self.weight, self.bias)


class ResidualMlp(nn.Module):
    """Residual block x + W2 GELU(W1 LN(x)) with expansion 2, [B, D] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class TextAdapter(nn.Module):
    """Text head of LLM2CLIP (2411.04997) in fp32, [B, width] -> [B, joint], not normalised."""

    def __init__(self, width: int, joint: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualMlp(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, joint)

    def forward(self, sentence: Tensor) -> Tensor:
        return self.project(self.norm(self.blocks(F.normalize(sentence.float(), dim=-1))))


def image_head(kind: ImageHead, width: int, joint: int, bias: bool = False) -> nn.Module:
    """Build the image head: CLIP's linear map, or none, as SigLIP's.

    Raises ConfigError if there is none and the joint space has another width.
    """
    if kind == "linear":
        return Projection(width, joint, bias)
    if width != joint:
        raise ConfigError(
            f"clip.image_head=none needs clip.embed_dim={width}, the width of the backbone, and it "
            f"is {joint}"
        )
    return nn.Identity()


def text_head(kind: TextHead, width: int, joint: int, blocks: int, bias: bool = False) -> nn.Module:
    """Build the text head: CLIP's linear map, or LLM2CLIP's adapter of `blocks` residual MLPs."""
    if kind == "linear":
        return TextProjection(width, joint, bias)
    return TextAdapter(width, joint, blocks)
