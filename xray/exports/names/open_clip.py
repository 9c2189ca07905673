"""Names of open_clip's ViT and text transformer, and of OpenAI's CLIP.

Its ViT has no bias in the patch embedding. The text transformer is transformers' CLIPTextModel, or
SiglipTextModel, on our side.
"""

from xray.exports.names.table import Names

VISION = Names(
    ("patch_embed.proj.weight", "conv1.weight"),
    ("cls_token", "class_embedding", "11"),
    ("pos_embed", "positional_embedding", "1"),
    ("norm_pre", "ln_pre"),
    ("blocks.*.norm1", "transformer.resblocks.*.ln_1"),
    ("blocks.*.attn.qkv.weight", "transformer.resblocks.*.attn.in_proj_weight"),
    ("blocks.*.attn.qkv.bias", "transformer.resblocks.*.attn.in_proj_bias"),
    ("blocks.*.attn.proj", "transformer.resblocks.*.attn.out_proj"),
    ("blocks.*.ls1.gamma", "transformer.resblocks.*.ls_1.gamma"),
    ("blocks.*.norm2", "transformer.resblocks.*.ln_2"),
    ("blocks.*.mlp.fc1", "transformer.resblocks.*.mlp.c_fc"),
    ("blocks.*.mlp.fc2", "transformer.resblocks.*.mlp.c_proj"),
    ("blocks.*.ls2.gamma", "transformer.resblocks.*.ls_2.gamma"),
    ("norm", "ln_post"),
    ("vision_projection.weight", "proj", "t"),
)
# open_clip holds the image tower of a model of timm by timm's names, and its projection beside it.
TRUNK_PROJECTION = Names(("vision_projection", "head.proj"))
TRUNK_HEAD = Names(("vision_projection", "trunk.head"))

TEXT = Names(
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.*.layer_norm1", "transformer.resblocks.*.ln_1"),
    (
        "encoder.layers.*.self_attn.q_proj.weight encoder.layers.*.self_attn.k_proj.weight "
        "encoder.layers.*.self_attn.v_proj.weight",
        "transformer.resblocks.*.attn.in_proj_weight",
    ),
    (
        "encoder.layers.*.self_attn.q_proj.bias encoder.layers.*.self_attn.k_proj.bias "
        "encoder.layers.*.self_attn.v_proj.bias",
        "transformer.resblocks.*.attn.in_proj_bias",
    ),
    ("encoder.layers.*.self_attn.out_proj", "transformer.resblocks.*.attn.out_proj"),
    ("encoder.layers.*.layer_norm2", "transformer.resblocks.*.ln_2"),
    ("encoder.layers.*.mlp.fc1", "transformer.resblocks.*.mlp.c_fc"),
    ("encoder.layers.*.mlp.fc2", "transformer.resblocks.*.mlp.c_proj"),
    ("final_layer_norm", "ln_final"),
)
PROJECTION = Names(("text_adapter.weight", "text_projection", "t"))
LINEAR = Names(("text_adapter", "text_projection"))  # with a bias, as SigLIP's
