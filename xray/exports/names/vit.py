"""Names of transformers' ViTModel, Dinov2Model (also with registers) and DINOv3ViTModel."""

from xray.exports.names.table import Names

LAYER = "encoder.layer.*."
EMBEDDINGS = (
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    ("pos_embed", "embeddings.position_embeddings"),
)
ATTENTION = (
    (
        "blocks.*.attn.qkv",
        " ".join(f"{LAYER}attention.attention.{part}" for part in ("query", "key", "value")),
    ),
    ("blocks.*.attn.proj", f"{LAYER}attention.output.dense"),
    ("norm", "layernorm"),
)

VIT = Names(
    *EMBEDDINGS,
    *ATTENTION,
    ("blocks.*.norm1", f"{LAYER}layernorm_before"),
    ("blocks.*.norm2", f"{LAYER}layernorm_after"),
    ("blocks.*.mlp.fc1", f"{LAYER}intermediate.dense"),
    ("blocks.*.mlp.fc2", f"{LAYER}output.dense"),
    ignored=r"pooler\.|classifier\.|embeddings\.mask_token$|decoder\.",
)
DINOV2 = Names(
    *EMBEDDINGS,
    *ATTENTION,
    ("blocks.*.norm1", f"{LAYER}norm1"),
    ("blocks.*.norm2", f"{LAYER}norm2"),
    ("blocks.*.ls1.gamma", f"{LAYER}layer_scale1.lambda1"),
    ("blocks.*.ls2.gamma", f"{LAYER}layer_scale2.lambda1"),
    ("blocks.*.mlp.fc1", f"{LAYER}mlp.fc1"),
    ("blocks.*.mlp.fc2", f"{LAYER}mlp.fc2"),
    ("blocks.*.mlp.fc1", f"{LAYER}mlp.weights_in"),  # SwiGLU of the largest
    ("blocks.*.mlp.fc2", f"{LAYER}mlp.weights_out"),
    ignored=r"classifier\.|embeddings\.mask_token$",
)
LAYER_3 = "layer.*."
BLOCKS_3 = (
    ("patch_embed.proj", "embeddings.patch_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    ("norm", "norm"),
    ("blocks.*.norm1", f"{LAYER_3}norm1"),
    (
        "blocks.*.attn.qkv.weight",
        " ".join(f"{LAYER_3}attention.{part}_proj.weight" for part in "qkv"),
    ),
    ("blocks.*.attn.q_bias", f"{LAYER_3}attention.q_proj.bias"),
    ("blocks.*.attn.v_bias", f"{LAYER_3}attention.v_proj.bias"),
    ("blocks.*.attn.proj", f"{LAYER_3}attention.o_proj"),
    ("blocks.*.gamma_1", f"{LAYER_3}layer_scale1.lambda1"),
    ("blocks.*.norm2", f"{LAYER_3}norm2"),
    ("blocks.*.mlp.fc2", f"{LAYER_3}mlp.down_proj"),
    ("blocks.*.gamma_2", f"{LAYER_3}layer_scale2.lambda1"),
)
IGNORED_3 = r"embeddings\.mask_token$"
DINOV3 = Names(*BLOCKS_3, ("blocks.*.mlp.fc1", f"{LAYER_3}mlp.up_proj"), ignored=IGNORED_3)
DINOV3_GATED = Names(
    *BLOCKS_3,
    ("blocks.*.mlp.fc1_g", f"{LAYER_3}mlp.gate_proj"),
    ("blocks.*.mlp.fc1_x", f"{LAYER_3}mlp.up_proj"),
    ignored=IGNORED_3,
)
