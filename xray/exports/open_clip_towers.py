"""Both towers of a clip artifact as open_clip builds them: what fits, the settings, the weights.

The image tower is open_clip's own ViT or a model of timm, the text tower CLIP's or SigLIP's.
"""

from __future__ import annotations

from typing import Any

from xray.artifacts.encoders import Encoder, ImageEncoder
from xray.artifacts.manifest_config import model_config
from xray.exports.common import image_state, is_present, mlp_ratio
from xray.exports.names.open_clip import (
    LINEAR,
    PROJECTION,
    TEXT,
    TRUNK_HEAD,
    TRUNK_PROJECTION,
    VISION,
)
from xray.exports.plain_vit import (
    State,
    activation_name,
    fill_bias,
    fold_bias,
    has_plain_mlp,
    plain_state,
    renamed,
    unsupported_part,
)

TIMM_POOLS = {"map": "map", "cls": "token", "mean": "avg"}  # open_clip's timm_pool by model.pool
TANH = {"approximate": "tanh"}


def is_timm(encoder: ImageEncoder) -> bool:
    """Tell if the image tower is a model of timm for open_clip, whose own ViT is plainer."""
    head: Any = encoder.vision_projection
    bias = is_present(head) and head.bias is not None
    return encoder.vision.pool == "map" or encoder.vision.eva or bias


def is_quick(encoder: ImageEncoder) -> bool:
    """Tell if open_clip builds both towers with QuickGELU, which its models of timm ignore."""
    blocks: Any = encoder.vision.blocks
    return not is_timm(encoder) and activation_name(blocks[0].mlp.act) == "quick_gelu"


def unsupported_vision(encoder: ImageEncoder) -> str:
    """Name the part of a backbone that open_clip lacks, or ""."""
    vision = encoder.vision
    if is_timm(encoder):
        model = model_config(encoder.artifact)
        own = model.kwargs or model.norm_eps
        return f"open_clip builds {model.name} only without model.kwargs" if own else ""
    if vision.pool == "mean" and vision.cls_token is None:
        return "it has no CLS token, which open_clip's ViT always has (model.pool=mean)"
    if vision.reg_token is not None:
        return "it has register tokens"
    if not is_present(encoder.vision_projection):
        return "it has no projection (clip.image_head=none)"
    return unsupported_part(vision, has_plain_mlp)


def unsupported_text(encoder: Encoder) -> str:
    """Return the reason why open_clip cannot build the text tower, or ""."""
    llm: Any = encoder.text.llm
    kind, settings = type(llm).__name__, llm.config
    if kind not in ("CLIPTextModel", "SiglipTextModel"):
        return f"the text tower is a {kind}, open_clip's is CLIP's text transformer"
    quick = settings.hidden_act == "quick_gelu"
    if settings.hidden_act not in ("gelu", "gelu_pytorch_tanh") and not quick:
        return f"its activation is {settings.hidden_act}"
    if quick != is_quick(encoder):
        return f"its activation is {settings.hidden_act}, that of the image tower is another"
    if encoder.text.pooling != "last" or encoder.tokenizer.prompt:
        return "it is not pooled at the end token of the caption without a prompt"
    if encoder.tokenizer.full != (kind == "SiglipTextModel"):
        return f"its captions are padded as no {kind} is trained (text.padding)"
    if any(".lora_" in name for name in encoder.text.state_dict()):
        return "it has LoRA weights: use text.tune=full"
    tokenizer = encoder.tokenizer.tokenizer
    if kind == "CLIPTextModel" and tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        return "its tokenizer ends no caption in an end token"
    return ""


def vision_settings(encoder: ImageEncoder, side: int) -> dict[str, Any]:
    """Return section vision_cfg for images of `side` pixels."""
    vision = encoder.vision
    if is_timm(encoder):
        head: Any = encoder.vision_projection
        linear = "linear" if is_present(head) and head.bias is None else None
        return {
            "image_size": side,
            "timm_model_name": model_config(encoder.artifact).name.partition(".")[0],
            "timm_pool": TIMM_POOLS[vision.pool],
            "timm_proj": linear if is_present(head) else "none",  # null: the model's own head
        }
    blocks: Any = vision.blocks
    first = blocks[0]
    settings = {
        "image_size": side,
        "layers": len(blocks),
        "width": vision.embed_dim,
        "head_width": vision.embed_dim // first.attn.num_heads,
        "patch_size": list(vision.patch_size),
        "mlp_ratio": mlp_ratio(first.mlp.fc1.out_features, vision.embed_dim),
        "no_ln_pre": not is_present(vision.norm_pre),
        "norm_kwargs": {"eps": first.norm1.eps},
    }
    if vision.pool == "mean":
        settings |= {"pool_type": "avg", "final_ln_after_pool": is_present(vision.fc_norm)}
    if is_present(first.ls1):
        settings["ls_init_value"] = 1.0  # replaced by the weights
    if activation_name(first.mlp.act) == "gelu_pytorch_tanh":
        settings["act_kwargs"] = TANH
    return settings


def text_settings(encoder: Encoder) -> dict[str, Any]:
    """Return section text_cfg."""
    llm: Any = encoder.text.llm
    settings, tokenizer = llm.config, encoder.tokenizer.tokenizer
    given = {
        "context_length": encoder.tokenizer.max_length,
        "vocab_size": settings.vocab_size,
        "width": settings.hidden_size,
        "heads": settings.num_attention_heads,
        "layers": settings.num_hidden_layers,
        "mlp_ratio": mlp_ratio(settings.intermediate_size, settings.hidden_size),
        "norm_kwargs": {"eps": settings.layer_norm_eps},
        "pad_id": tokenizer.pad_token_id,
        "hf_tokenizer_name": ".",  # any name: open_clip reads the folder
        "proj_bias": has_bias(encoder),
    }
    if settings.hidden_act == "gelu_pytorch_tanh":
        given["act_kwargs"] = TANH
    if encoder.tokenizer.full:
        return given | {"pool_type": "last", "no_causal_mask": True}
    return given | {"pool_type": "eos", "eos_id": tokenizer.eos_token_id}


def has_bias(encoder: Encoder) -> bool:
    """Tell if the text projection has a bias."""
    projection: Any = encoder.text_adapter
    return projection.bias is not None


def vision_state(encoder: ImageEncoder, side: int) -> State:
    """Rename the image tower's weights, below `visual.`."""
    head = {k: v.detach() for k, v in encoder.vision_projection.named_parameters()}
    projection = {f"vision_projection.{name}": value for name, value in head.items()}
    if is_timm(encoder):
        named = {f"trunk.{name}": value for name, value in image_state(encoder, side).items()}
        table = TRUNK_HEAD if "vision_projection.bias" in projection else TRUNK_PROJECTION
        named |= table.to_theirs(projection).state
    else:
        own = plain_state(encoder, side)
        fold_bias(own)
        for number in range(len(list(encoder.vision.blocks.children()))):
            fill_bias(own, f"blocks.{number}.attn.qkv")
        named = renamed(VISION, own | projection)
    return {f"visual.{name}": value for name, value in named.items()}


def text_state(encoder: Encoder) -> State:
    """Rename the text tower's weights and projection."""
    own = {k: v.detach() for k, v in encoder.text.llm.state_dict().items()}
    positions = "embeddings.position_embedding.weight"
    own[positions] = own[positions][: encoder.tokenizer.max_length]
    head = {f"text_adapter.{k}": v.detach() for k, v in encoder.text_adapter.named_parameters()}
    return renamed(TEXT, own) | (LINEAR if has_bias(encoder) else PROJECTION).to_theirs(head).state
