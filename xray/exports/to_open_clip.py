"""Export as a folder that open_clip's `local-dir:` loads: both towers, or the image tower.

open_clip's own ViT takes any width, depth and size, and its text tower is CLIP's (2103.00020): a
causal transformer read at its end token, then one linear map.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from xray.artifacts.artifact import Artifact, save_tensors
from xray.artifacts.encoders import Encoder, ImageEncoder
from xray.artifacts.manifest_config import data_config, image_side
from xray.errors import ArtifactError, ConfigError, brief
from xray.exports.common import (
    CAPTIONS,
    Export,
    difference,
    image_state,
    is_present,
    sample_images,
    save_json,
    vision_of,
)

MODEL = "open_clip_model.safetensors"
# Placeholder for a missing text tower, so that open_clip loads the image tower. Reading texts
# fails: the tokenizer refuses an argument whose name says why, and encode_text finds no end token.
NO_TEXT: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49_408,  # as open_clip's own, because a lookup beyond it would end a CUDA process
    "width": 1,
    "heads": 1,
    "layers": 1,
    "pool_type": "eos",
    "eos_id": None,
}
REFUSAL = "this_model_has_no_text_tower"


def to_open_clip(artifact: Artifact, out: Path) -> Export:
    """Write open_clip_config.json and the image tower's weights; the text tower's, if it is CLIP's.

    Raises ArtifactError for a backbone that open_clip's ViT cannot represent, ConfigError if
    open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            "--to open_clip needs pip install 'xray-trainer[open_clip]' to check what it writes"
        ) from error
    encoder, side = vision_of(artifact, "open_clip"), image_side(artifact)
    if not isinstance(encoder, ImageEncoder):
        raise ArtifactError(
            f"{artifact.origin} is of stage {artifact.stage}: --to open_clip is for stage clip; "
            "use --to timm for a backbone"
        )
    reason = unsupported_vision(encoder)
    if reason:
        raise ArtifactError(
            f"{artifact.origin} cannot be open_clip's ViT: {reason}; use --to timm for the backbone"
        )
    texts, missing = text_side(artifact)
    save_json(out / "open_clip_config.json", _config(artifact, encoder, texts, side))
    state = vision_state(encoder, side) | _scalars(artifact)
    if texts is None:
        state |= _no_text(encoder)
    else:
        state |= text_state(texts)
        texts.tokenizer.tokenizer.save_pretrained(out)
    save_tensors(out / MODEL, state)

    name = f"local-dir:{out}"
    try:
        model = open_clip.create_model(name).eval()
    except Exception as error:  # a shape that open_clip builds differently
        raise ArtifactError(f"open_clip cannot load what was written: {brief(error)}") from error
    pixels, encoder.keep_rate = sample_images(side), 1.0
    with torch.no_grad():
        image = model.encode_image(encoder.normalize(pixels)[:, 0])
        differences = {"image features": difference(image, encoder.encode_pixels(pixels))}
        if texts is not None:
            tokens = open_clip.get_tokenizer(name)(list(CAPTIONS))
            text = model.encode_text(tokens)
            differences["text features"] = difference(text, texts.encode_text(CAPTIONS))
    notes = [*_notes(missing), *_crop_notes(data_config(artifact).crop_pct)]
    return Export("open_clip", _code(texts is not None), differences, notes)


def text_side(artifact: Artifact) -> tuple[Encoder | None, str]:
    """Load the text tower if open_clip can build it, else say why not; an LLM is not loaded."""
    if not artifact.has_tensor("head", "text_adapter.weight"):
        return None, (
            "the text features go through LLM2CLIP's adaptor (clip.text_head=adapter), which "
            "open_clip has no place for; clip.text_head=linear is CLIP's own"
        )
    encoder = Encoder(artifact)
    reason = unsupported_text(encoder)
    return (None, reason) if reason else (encoder, "")


def _code(with_text: bool) -> list[str]:
    code = [
        "import open_clip",
        "",
        'name = "local-dir:FOLDER"  # this folder',
        "model, preprocess = open_clip.create_model_from_pretrained(name)",
        "image = model.encode_image(preprocess(picture)[None], normalize=True)  # of a PIL picture",
    ]
    if with_text:
        code += [
            "tokenizer = open_clip.get_tokenizer(name)",
            'text = model.encode_text(tokenizer(["a dog on a beach"]), normalize=True)',
        ]
    return code


def _notes(missing: str) -> list[str]:
    if missing:
        return [
            f"This folder has only the image tower and its projection: {missing}. "
            "`open_clip.get_tokenizer` and `encode_text` raise an error, because there is no text "
            f"tower (`{REFUSAL}`)."
        ]
    return [
        "open_clip's tokenizer repairs unicode and joins white space before it reads a caption; "
        "the original reads it unchanged."
    ]


def unsupported_vision(encoder: ImageEncoder) -> str:
    """Name the part of a backbone that open_clip's VisionTransformer lacks, or ""."""
    vision = encoder.vision
    if vision.pool != "cls":
        return f"its feature is not a CLS token (model.pool={vision.pool})"
    if vision.eva:
        return "it is timm's Eva, with other blocks"
    if vision.reg_token is not None:
        return "it has register tokens"
    if is_present(vision.patch_embed.norm):
        return "its stem ends in a norm"
    norms = [m for m in vision.modules() if isinstance(m, nn.LayerNorm)]
    if len({norm.eps for norm in norms}) != 1:
        return "its norms have more than one epsilon"
    blocks: Any = vision.blocks
    for block in blocks:
        attention, mlp = block.attn, block.mlp
        if is_present(attention.q_norm) or is_present(attention.norm):
            return "its attention has normalisation layers"
        gelu = type(mlp) is Mlp and isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none"
        if not gelu or is_present(mlp.norm):
            return f"its MLP is not two linear layers with GELU ({type(mlp).__name__})"
        if not all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)):
            return "its blocks have other norms than LayerNorm"
    return ""


def unsupported_text(encoder: Encoder) -> str:
    """Return the reason why open_clip cannot build the text tower, or ""."""
    llm: Any = encoder.text.llm
    kind, settings = type(llm).__name__, llm.config
    if kind != "CLIPTextModel":
        return f"the text tower is a {kind}, open_clip's is CLIP's text transformer"
    if settings.hidden_act != "gelu":
        return f"its activation is {settings.hidden_act}, that of the image tower is gelu"
    at_the_end = encoder.text.pooling == "last" and not encoder.tokenizer.full
    if not at_the_end or encoder.tokenizer.prompt:
        return "it is not pooled at the end token of the caption without a prompt"
    if any(".lora_" in name for name in encoder.text.state_dict()):
        return "it has LoRA weights: use text.tune=full"
    tokenizer = encoder.tokenizer.tokenizer
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        return "its tokenizer ends no caption in an end token"
    return ""


def _crop_notes(crop_pct: float) -> list[str]:
    if crop_pct == 1:
        return []
    return [
        f"open_clip's preprocessing has no crop of {crop_pct:g}: it shows the whole short side."
    ]


def _config(
    artifact: Artifact, encoder: ImageEncoder, texts: Encoder | None, side: int
) -> dict[str, Any]:
    vision, data = encoder.vision, data_config(artifact)
    blocks: Any = vision.blocks
    first = blocks[0]
    image = {
        "image_size": side,
        "layers": len(blocks),
        "width": vision.embed_dim,
        "head_width": vision.embed_dim // first.attn.num_heads,
        "patch_size": list(vision.patch_size),
        "mlp_ratio": first.mlp.fc1.out_features / vision.embed_dim,
        "no_ln_pre": not is_present(vision.norm_pre),
        "norm_kwargs": {"eps": first.norm1.eps},
    }
    if is_present(first.ls1):
        image["ls_init_value"] = 1.0  # replaced by the weights
    text = {**NO_TEXT, "tokenizer_kwargs": {REFUSAL: True}}
    if texts is not None:
        llm: Any = texts.text.llm
        settings, tokenizer = llm.config, texts.tokenizer.tokenizer
        text = {
            "context_length": texts.tokenizer.max_length,
            "vocab_size": settings.vocab_size,
            "width": settings.hidden_size,
            "heads": settings.num_attention_heads,
            "layers": settings.num_hidden_layers,
            "mlp_ratio": settings.intermediate_size / settings.hidden_size,
            "norm_kwargs": {"eps": settings.layer_norm_eps},
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
            "hf_tokenizer_name": ".",  # any name: open_clip reads the folder
        }
    width = encoder.vision_projection.out_features
    model = {"embed_dim": width, "vision_cfg": image, "text_cfg": text}
    if artifact.has_tensor("head", "logit_bias"):
        model["init_logit_bias"] = 0.0  # replaced by the weights
    mean, std = data.normalisation
    mode = "squash" if data.resize == "squash" else "shortest"
    reads = {"interpolation": data.interpolation, "resize_mode": mode, "size": side}
    preprocess = {**reads, "mean": mean, "std": std}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def vision_state(encoder: ImageEncoder, side: int) -> dict[str, Tensor]:
    """Rename the image tower's weights for open_clip, with the stem's bias in the positions."""
    vision, own = encoder.vision, image_state(encoder, side)
    places = own["pos_embed"][0]
    missing = vision.num_prefix_tokens - vision.position_prefix  # rows of the CLS token
    places = torch.cat([places.new_zeros(missing, places.shape[1]), places])
    bias = own.get("patch_embed.proj.bias")
    if bias is not None:
        places = torch.cat([places[:1], places[1:] + bias])
    state = {
        "conv1.weight": own["patch_embed.proj.weight"],
        "class_embedding": own["cls_token"][0, 0],
        "positional_embedding": places,
        "proj": encoder.vision_projection.weight.detach().t(),
    }
    last = "norm" if is_present(vision.norm) else "fc_norm"
    for old, new in (("norm_pre", "ln_pre"), (last, "ln_post")):
        state |= {k.replace(old, new, 1): v for k, v in own.items() if k.startswith(f"{old}.")}
    for number in range(len(list(vision.blocks.children()))):
        block = _part(own, f"blocks.{number}.")
        bias = block.get("attn.qkv.bias", torch.zeros(3 * vision.embed_dim))
        named = {"attn.in_proj_weight": block["attn.qkv.weight"], "attn.in_proj_bias": bias}
        names = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "ls1": "ls_1",
                 "ls2": "ls_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
        named |= dict(_renamed(block, names))
        for linear in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
            named.setdefault(f"{linear}.bias", torch.zeros(len(named[f"{linear}.weight"])))
        state |= {f"transformer.resblocks.{number}.{k}": v for k, v in named.items()}
    return {f"visual.{name}": value for name, value in state.items()}


def text_state(encoder: Encoder) -> dict[str, Tensor]:
    """Rename the text tower's weights and projection for open_clip."""
    own = {k: v.detach() for k, v in encoder.text.llm.state_dict().items()}
    projection: Any = encoder.text_adapter
    length = encoder.tokenizer.max_length
    state = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"][:length],
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
        "text_projection": projection.weight.detach().t(),
    }
    for number in range(encoder.text.llm.config.num_hidden_layers):  # type: ignore[union-attr,arg-type]
        block = _part(own, f"encoder.layers.{number}.")
        rows = [f"self_attn.{name}_proj" for name in "qkv"]
        named = {
            "attn.in_proj_weight": torch.cat([block[f"{row}.weight"] for row in rows]),
            "attn.in_proj_bias": torch.cat([block[f"{row}.bias"] for row in rows]),
        }
        names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
                 "self_attn.out_proj": "attn.out_proj", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
        named |= dict(_renamed(block, names))
        state |= {f"transformer.resblocks.{number}.{k}": v for k, v in named.items()}
    return state


def _no_text(encoder: ImageEncoder) -> dict[str, Tensor]:
    """Make the weights of NO_TEXT, all NaN."""
    from open_clip.transformer import TextTransformer

    tower = TextTransformer(**NO_TEXT, output_dim=encoder.vision_projection.out_features)
    return {name: torch.full_like(t, torch.nan) for name, t in tower.state_dict().items()}


def _scalars(artifact: Artifact) -> dict[str, Tensor]:
    """Return the log of the logit scale, and the sigmoid loss's bias."""
    head = artifact.load("head")
    return {k: head[k].reshape(()) for k in ("logit_scale", "logit_bias") if k in head}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _renamed(block: dict[str, Tensor], names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a block under their new names; others are left out."""
    for name, value in block.items():
        module, _, leaf = name.rpartition(".")
        if module in names:
            yield f"{names[module]}.{leaf}", value
