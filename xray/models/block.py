"""Transformer blocks with token reduction between attention and MLP."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xray.models.rotary import RotaryAttention
from xray.models.token_reduction import Spec, TokenState, reduce_tokens, size_bias


class RotaryBlock(nn.Module):
    """Pre-norm block with rotary positions, of the parameters of timm's EvaBlock."""

    def __init__(self, block: EvaBlock) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = RotaryAttention(block.attn)
        self.gamma_1, self.gamma_2 = block.gamma_1, block.gamma_2
        self.drop_path1, self.drop_path2 = block.drop_path1, block.drop_path2

    def forward(
        self, x: Tensor, state: TokenState, spec: Spec | None, recompute: bool
    ) -> tuple[Tensor, TokenState]:
        """Run the block as `run_block` does; ZeRO 3 gathers its own parameters for this call."""
        return _run(self, x, state, spec, recompute)

    def ls1(self, x: Tensor) -> Tensor:
        """Scale the attention's output, if the model does."""
        return x if self.gamma_1 is None else self.gamma_1 * x

    def ls2(self, x: Tensor) -> Tensor:
        """Scale the MLP's output, if the model does."""
        return x if self.gamma_2 is None else self.gamma_2 * x


def run_block(
    block: Block | RotaryBlock, x: Tensor, state: TokenState, spec: Spec | None, recompute: bool
) -> tuple[Tensor, TokenState]:
    """Run a block on x [B, P + n, D] and reduce tokens between attention and MLP.

    Without a spec no token is removed; the sizes of merged tokens are part of the attention.
    recompute: do not keep the MLP's hidden activations for the backward pass.
    """
    if isinstance(block, RotaryBlock):
        return block(x, state, spec, recompute)
    return _run(block, x, state, spec, recompute)


def _run(
    block: Block | RotaryBlock, x: Tensor, state: TokenState, spec: Spec | None, recompute: bool
) -> tuple[Tensor, TokenState]:
    attention: Any = block.attn
    given, bias = block.norm1(x), size_bias(state, x.dtype)
    if isinstance(attention, RotaryAttention):
        attended, q, k = attention(given, state.rotation, bias)
    else:
        attended, q, k = attend(attention, given, bias)
    x = x + block.drop_path1(block.ls1(attended))
    if spec is not None:
        x, state = reduce_tokens(x, q, k, state, spec)
    hidden = block.norm2(x)
    hidden = checkpoint(block.mlp, hidden, use_reentrant=False) if recompute else block.mlp(hidden)
    return x + block.drop_path2(block.ls2(hidden)), state


def attend(attn: Attention, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run timm's attention with SDPA on x [B, N, D] and also return its queries and keys.

    bias: added to the attention logits, [B, 1, 1, N], or None. Returns the output [B, N, D],
    queries and keys, each [B, H, N, d].
    """
    B, N, _ = x.shape
    qkv = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, N, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    out = attn.norm(out.transpose(1, 2).reshape(B, N, -1))
    return attn.proj_drop(attn.proj(out)), q, k
