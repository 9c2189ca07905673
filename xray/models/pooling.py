"""Pooling of the backbone's tokens into one feature, and the head's attention that EViT uses.

Shapes: B batch, P prefix tokens, n patch tokens, D width, H heads of the pooling head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from xray.models.token_reduction import PoolingHead, TokenState, size_bias

if TYPE_CHECKING:
    from xray.models.backbone import VisionBackbone


class Keys(nn.Linear):
    """Projection to keys and values, which also gives its weights to `work`."""

    def forward(self, x: Tensor, work: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return super().forward(x) if work is None else work(self.weight)


class AttentionPooling(AttentionPoolLatent):
    """Attention pooling head of timm, which also gives its query to EViT.

    ZeRO 3 gathers partitioned weights only inside the forward pass of their module.
    """

    @classmethod
    def of(cls, pool: AttentionPoolLatent) -> AttentionPooling:
        """Make timm's module one of this class; its parameters keep their names."""
        pool.__class__, pool.kv.__class__ = cls, Keys
        assert isinstance(pool, cls)
        return pool

    def forward(self, x: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        """Pool tokens [B, N, D] to [B, D]; for x = None, return the query of `latent_query`."""
        if x is None:
            return latent_query(self)
        return super().forward(x, attn_mask)


def pool_tokens(vit: VisionBackbone, x: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:
    """Normalise and pool x [B, P + n, D]: the feature [B, D] and the patch tokens [B, n, D].

    For images, the feature equals timm's `forward_head(pre_logits=True)`. A token that ToMe merged
    counts as often in the mean as the tokens in it, and has the same bias in the attention of the
    pooling head as in the blocks.
    """
    x, sizes = vit.norm(x), state.sizes
    P, first = vit.num_prefix_tokens, vit.pooled_from
    if vit.attn_pool is not None:
        bias = size_bias(state, x.dtype)
        pooled = vit.attn_pool(x[:, first:], None if bias is None else bias[..., first:])
    elif sizes is None:
        pooled = x[:, first:].mean(dim=1)
    else:
        weights = (sizes[:, first:] / sizes[:, first:].sum(dim=1, keepdim=True)).to(x.dtype)
        pooled = (weights[..., None] * x[:, first:]).sum(dim=1)
    return vit.fc_norm(pooled), vit.fc_norm(x[:, P:])


def pooling_head(vit: VisionBackbone) -> PoolingHead | None:
    """Prepare the pooling head's attention for `head_attention`; None without such a head."""
    if vit.attn_pool is None:
        return None
    return PoolingHead(vit.norm, vit.attn_pool(None), vit.pooled_from)


@torch.no_grad()
def latent_query(pool: AttentionPooling) -> Tensor:
    """Return the latent query of each head, multiplied by its key weights and scale, [H, D].

    Its product with a normalised token is the logit of the head's attention, but for the key's
    bias, which is the same for all tokens and has no effect on the softmax.
    """
    heads, width = pool.num_heads, pool.num_heads * pool.head_dim
    dtype = torch.promote_types(pool.latent.dtype, torch.float32)
    with torch.autocast(pool.latent.device.type, enabled=False):
        query = pool.q(pool.latent)[0, 0].reshape(heads, 1, -1).to(dtype)

        def product(weight: Tensor) -> Tensor:
            keys = weight[:width].reshape(heads, query.shape[-1], -1).to(dtype)
            return (query @ keys)[:, 0] * pool.scale

        return pool.kv(query, product)
