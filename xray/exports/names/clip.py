"""Names of transformers' CLIPModel and MetaClip2Model.

Its text transformer is ours, too: only the prefix `text_model.` differs.
"""

from xray.exports.names.table import Names

LAYER = "encoder.layers.*."


def layers(attention: str = "self_attn") -> tuple[tuple[str, ...], ...]:
    """Return the entries of the blocks that CLIP and SigLIP share."""
    qkv = " ".join(f"{LAYER}{attention}.{part}_proj" for part in "qkv")
    return (
        ("blocks.*.norm1", f"{LAYER}layer_norm1"),
        ("blocks.*.attn.qkv", qkv),
        ("blocks.*.attn.proj", f"{LAYER}{attention}.out_proj"),
        ("blocks.*.norm2", f"{LAYER}layer_norm2"),
        ("blocks.*.mlp.fc1", f"{LAYER}mlp.fc1"),
        ("blocks.*.mlp.fc2", f"{LAYER}mlp.fc2"),
        ("norm", "post_layernorm"),
    )


VISION = Names(
    ("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    ("cls_token", "embeddings.class_embedding", "11"),
    ("pos_embed", "embeddings.position_embedding.weight", "1"),
    ("norm_pre", "pre_layrnorm"),
    *layers(),
    ignored=r"embeddings\.position_ids$",
)
HEAD = Names(("vision_projection", "visual_projection"), ("text_adapter", "text_projection"))
