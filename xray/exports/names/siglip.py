"""Names of transformers' SiglipModel and Siglip2Model, whose image tower ends in attention pooling.

Siglip2Model embeds patches with a matrix.
"""

from xray.exports.names.clip import layers
from xray.exports.names.table import Names

POOL = (
    ("attn_pool.latent", "head.probe"),
    ("attn_pool.q.weight attn_pool.kv.weight*2", "head.attention.in_proj_weight"),
    ("attn_pool.q.bias attn_pool.kv.bias*2", "head.attention.in_proj_bias"),
    ("attn_pool.proj", "head.attention.out_proj"),
    ("attn_pool.norm", "head.layernorm"),
    ("attn_pool.mlp.fc1", "head.mlp.fc1"),
    ("attn_pool.mlp.fc2", "head.mlp.fc2"),
)
POSITIONS = ("pos_embed", "embeddings.position_embedding.weight", "1")
IGNORED = r"embeddings\.position_ids$"

VISION = Names(
    ("patch_embed.proj", "embeddings.patch_embedding"),
    POSITIONS, *layers(), *POOL, ignored=IGNORED,
)  # fmt: skip
VISION_2 = Names(
    ("patch_embed.proj", "embeddings.patch_embedding", "patch"),
    POSITIONS, *layers(), *POOL, ignored=IGNORED,
)  # fmt: skip
HEAD = Names(("text_adapter", "text_model.head"))
