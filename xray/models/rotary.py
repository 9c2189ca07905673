"""Rotary positions of timm's Eva models (EVA-02, DINOv3, PE) and their attention.

A rotation is a tensor [..., n, 2 * d]: sines, then cosines of the angles by which the d channels of
a head are rotated, for n patch tokens. Prefix tokens are not rotated. Shapes as in
`xray.models.token_reduction`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotary:
    """Axial rotary positions of a patch grid: half of the channels encode rows, half columns.

    It has no tensors: timm's modules store theirs as buffers, which artifacts do not contain.
    """

    width: int  # channels of a head
    temperature: float
    offset: float  # added to rows and columns
    columns_first: bool  # the first half of the channels encodes columns
    halves: bool  # channel i is rotated with i + width / 2, not with its neighbour
    centred: bool  # positions are in (-1, 1), as in DINOv3, and not numbers of rows and columns
    reference: tuple[int, int] | None  # grid to which the rows and columns of others are scaled

    @classmethod
    def of(cls, rope: Any) -> Rotary:
        """Read the settings of timm's RotaryEmbeddingCat or RotaryEmbeddingDinoV3."""
        centred = isinstance(rope, RotaryEmbeddingDinoV3)
        reference = None if centred else rope.ref_feat_shape
        return cls(
            rope.dim,
            float(rope.temperature),
            rope.grid_offset,
            rope.grid_indexing == "xy",
            rope.rotate_half,
            centred,
            None if reference is None else (reference[0], reference[1]),
        )

    def rotation(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return the rotation of the patches of a grid, [height * width, 2 * d], in fp32."""
        bands = self.width // 4
        exponents = torch.arange(bands, dtype=torch.float32, device=device) / bands
        rates = self.temperature**-exponents
        if self.centred:
            rates = 2 * math.pi * rates
        rows = self._axis(height, 0, device)[:, None] * rates
        columns = self._axis(width, 1, device)[:, None] * rates
        axes = [rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)]
        angles = torch.cat(axes[::-1] if self.columns_first else axes, dim=1)
        angles = angles.repeat(1, 2) if self.halves else angles.repeat_interleave(2, dim=1)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def _axis(self, size: int, axis: int, device: torch.device) -> Tensor:
        """Return the positions along an axis, [size]."""
        positions = torch.arange(size, dtype=torch.float32, device=device) + self.offset
        if self.centred:
            return 2 * (positions + 0.5) / size - 1
        return positions if self.reference is None else positions / size * self.reference[axis]


def kept_rotation(rotation: Tensor, index: Tensor, fused: bool) -> Tensor:
    """Select the rotations of the kept tokens, [B, k]; the fused token after them has none.

    It stands for many places. Like a prefix token, it is attended to at no position.
    """
    B, size = index.shape[0], rotation.shape[-1]
    kept = rotation.expand(B, -1, -1).gather(1, index[..., None].expand(-1, -1, size))
    if not fused:
        return kept
    none = torch.zeros(B, 1, size, dtype=kept.dtype, device=kept.device)
    none[..., size // 2 :] = 1  # cosines
    return torch.cat([kept, none], dim=1)


def rotated(x: Tensor, rotation: Tensor, halves: bool) -> Tensor:
    """Rotate queries or keys [B, H, P + n, d] by [1 or B, n, 2 * d]: the last n tokens."""
    prefix = x.shape[2] - rotation.shape[1]
    patches = x[:, :, prefix:]
    sin, cos = rotation[:, None].chunk(2, dim=-1)
    if halves:
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    patches = (patches * cos + turned * sin).to(x.dtype)
    return torch.cat([x[:, :, :prefix], patches], dim=2)


class RotaryAttention(nn.Module):
    """Attention with rotary positions, of the parameters of timm's EvaAttention or AttentionRope.

    Queries, keys and values have one projection `qkv`, with biases for queries and values
    apart from it, or three.
    """

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        self.halves: bool = attn.rotate_half
        self.qkv: nn.Module | None = attn.qkv
        self.q_proj, self.k_proj, self.v_proj = attn.q_proj, attn.k_proj, attn.v_proj
        self.q_bias: nn.Parameter | None = getattr(attn, "q_bias", None)
        self.v_bias: nn.Parameter | None = getattr(attn, "v_bias", None)
        self.q_norm, self.k_norm, self.norm = attn.q_norm, attn.k_norm, attn.norm
        self.attn_drop, self.proj, self.proj_drop = attn.attn_drop, attn.proj, attn.proj_drop

    def forward(
        self, x: Tensor, rotation: Tensor | None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend and return the output [B, N, D], and rotated queries and keys, [B, H, N, d].

        rotation: of the patch tokens, [1 or B, n, 2 * d], or None. bias: added to the attention
        logits, [B, 1, 1, N], or None.
        """
        B, N, _ = x.shape
        q, k, v = (
            part.reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
            for part in self._projected(x)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = (rotated(part, rotation, self.halves).to(v.dtype) for part in (q, k))
        dropout = self.attn_drop.p if self.training else 0.0
        mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, N, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.norm(out.transpose(1, 2).reshape(B, N, -1))
        return self.proj_drop(self.proj(out)), q, k

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_bias is not None and self.v_bias is not None:
            q, v = q + self.q_bias, v + self.v_bias
        return q, k, v
