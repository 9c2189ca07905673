"""Models of open_clip: its ViT or a ViT of timm, and its text transformer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from xray.config import ModelConfig
from xray.config.model import ImageHead
from xray.errors import ArtifactError, ConfigError
from xray.exports.names.open_clip import (
    LINEAR,
    PROJECTION,
    TEXT,
    TRUNK_HEAD,
    TRUNK_PROJECTION,
    VISION,
)
from xray.exports.names.table import Renamed
from xray.imports.parts import (
    CLIP_VIT,
    STEM,
    Family,
    Imported,
    Naming,
    State,
    Text,
    Vision,
    complete,
    flat,
    linear_head,
    side_of,
    square,
    vit,
    zeros,
)
from xray.imports.preprocessing import of_open_clip
from xray.imports.source import Source
from xray.imports.texts import (
    clean,
    clip_text,
    copy_tokenizer,
    siglip_text,
    write_clip_tokenizer,
)
from xray.models.timm_vit import create_timm
from xray.models.weight_loading import part

CONFIG = "open_clip_config.json"
BESIDE = ("logit_scale", "logit_bias")
IMAGE, TEXTS = "visual.", "text."  # prefixes of the towers' tensors
TRUNK, TRUNK_OWN = "trunk.", "trunk.head."  # of a model of timm in the image tower, of its head
STEM_BIAS = "patch_embed.proj.bias"
# Settings of a tower's blocks or heads that our towers do not have, with the value of a plain one.
PLAIN_BLOCKS = {
    "block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
    "scale_attn_inner": False, "scale_attn": False, "scale_fc": False,
}  # fmt: skip
PLAIN_VISION = {**PLAIN_BLOCKS, "attentional_pool": False, "pool_type": "tok"}
PLAIN_TEXT = {**PLAIN_BLOCKS, "hf_model_name": None, "embed_cls": False, "ls_init_value": None,
              "proj_type": "linear", "tokenizer_mode": None}  # fmt: skip
POOLS: dict[str | None, Any] = {"map": "map", "token": "cls", "avg": "mean", "": "cls"}


def read(source: Source, folder: Path) -> Imported:
    """Read both towers; raises ArtifactError for a part that ours cannot represent."""
    settings = source.json(CONFIG)
    config = settings.get("model_cfg")
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise ArtifactError(
            f"{source}/{CONFIG} has no model_cfg with embed_dim, vision_cfg, text_cfg"
        )
    if "multimodal_cfg" in config:
        raise ArtifactError(f"{source} is a CoCa: its text decoder is not supported")
    image, text = config["vision_cfg"], config["text_cfg"]
    quick = bool(config.get("quick_gelu", False))
    model = _timm(source, image) if image.get("timm_model_name") else _vit(source, image, quick)
    _refuse(source, "the text tower", text, PLAIN_TEXT)
    state = source.tensors()
    head = flat(state, *BESIDE)
    named, in_image = (_trunk if image.get("timm_model_name") else _own)(part(state, IMAGE))
    vision = complete(source, "the image tower", named, IMAGE)
    if model.kwargs.get("pre_norm") is False and STEM in vision:  # timm's then has a bias in it
        vision[STEM_BIAS] = zeros(vision[STEM])
    texts, prefix = _texts(state)
    own, projection = TEXT.to_ours(texts), LINEAR if text.get("proj_bias") else PROJECTION
    named = projection.to_ours({name: texts[name] for name in own.unknown})
    own = own._replace(unknown=named.unknown)
    head |= named.state
    for name in [name for name in vision if name.startswith("vision_projection.")]:
        head[name] = vision.pop(name)
    side = side_of(source, image.get("image_size", 224), vision)
    preprocess = of_open_clip(source, settings.get("preprocess_cfg", {}), side)
    own_text = complete(source, "the text tower", own, prefix)
    tower = _text(source, folder, text, quick, own_text, partial(TEXT.theirs, prefix=prefix))
    bias = any(name.endswith(".bias") for name in head)
    for layer in ("vision_projection", "text_adapter") if bias else ():
        if f"{layer}.weight" in head:  # one of them may have none
            head.setdefault(f"{layer}.bias", zeros(head[f"{layer}.weight"]))
    kind: ImageHead = "none" if image.get("timm_proj") == "none" else "linear"
    joint = linear_head(config["embed_dim"], kind, bias)

    def theirs(name: str) -> str:
        ours = name.startswith("vision_projection.")
        return in_image(name) if ours else projection.theirs(name, prefix)

    seen = Vision(model, preprocess, vision, in_image)
    return Imported("open_clip", seen, tower, joint, head, theirs)


def _refuse(source: Source, what: str, given: dict[str, Any], plain: dict[str, Any]) -> None:
    """Raise ArtifactError for the first setting that differs from a plain tower's."""
    for key, usual in plain.items():
        value = given.get(key, usual)
        if value != usual and value:
            raise ArtifactError(f"{source}: {what} has {key}={value}, which is not supported")


def _vit(source: Source, given: dict[str, Any], quick: bool) -> ModelConfig:
    """Return the settings of open_clip's own ViT."""
    if isinstance(given.get("layers"), list):
        raise ArtifactError(
            f"{source}: the image tower is a ResNet (layers={given['layers']}), not a ViT"
        )
    _refuse(source, "the image tower", given, PLAIN_VISION)
    width = given.get("width", 768)
    return vit(
        CLIP_VIT,
        (given.get("norm_kwargs") or {}).get("eps", 1e-5),
        patch_size=square(source, given.get("patch_size", 16)),
        embed_dim=width,
        depth=given.get("layers", 12),
        num_heads=width // given.get("head_width", 64),
        mlp_ratio=given.get("mlp_ratio", 4.0),
        act_layer=_activation(given, quick, {"gelu_pytorch_tanh": "gelu_tanh"}),
        init_values=given.get("ls_init_value"),
        pre_norm=not given.get("no_ln_pre", False),
    )


def _activation(given: dict[str, Any], quick: bool, names: dict[str, str]) -> str:
    tanh = (given.get("act_kwargs") or {}).get("approximate") == "tanh"
    name = "quick_gelu" if quick else "gelu_pytorch_tanh" if tanh else "gelu"
    return names.get(name, name)


def _timm(source: Source, given: dict[str, Any]) -> ModelConfig:
    """Return the settings of an image tower that is a model of timm."""
    pool = POOLS.get(given.get("timm_pool", "avg"), "cls")
    model = ModelConfig(name=given["timm_model_name"], pool=pool)
    side = square(source, given.get("image_size", 224))
    try:
        with torch.device("meta"):
            create_timm(model, (side, side))
    except ConfigError as error:
        raise ArtifactError(f"{source}: the image tower is not supported: {error}") from error
    return model


def _own(visual: State) -> tuple[Renamed, Naming]:
    """Return the tensors of open_clip's own ViT with its projection, and their names there."""
    return VISION.to_ours(visual), partial(VISION.theirs, prefix=IMAGE)


def _trunk(visual: State) -> tuple[Renamed, Naming]:
    """Return the tensors of a model of timm, and of the projection beside it or in its head."""
    beside = {name: value for name, value in visual.items() if not name.startswith(TRUNK)}
    table = TRUNK_PROJECTION if beside else TRUNK_HEAD
    named = table.to_ours(beside or {k: v for k, v in visual.items() if k.startswith(TRUNK_OWN)})
    own = {k: v for k, v in part(visual, TRUNK).items() if not k.startswith("head.")}

    def theirs(name: str) -> str:
        found = table.theirs(name)
        return IMAGE + (found if found != name else f"{TRUNK}{name}")

    return named._replace(state=named.state | own), theirs


def _texts(state: State) -> tuple[State, str]:
    """Select the tensors of the text tower; returns the prefix of their names, too.

    It is `text.` in a CustomTextCLIP.
    """
    custom = part(state, TEXTS)
    plain = {k: v for k, v in state.items() if not k.startswith(IMAGE) and k not in BESIDE}
    return (custom, TEXTS) if custom else (plain, "")


def _text(
    source: Source, folder: Path, given: dict[str, Any], quick: bool, state: State, theirs: Naming
) -> Text:
    """Make the text tower and its tokenizer."""
    width = given.get("width", 512)
    sizes = {
        "vocab_size": given.get("vocab_size", 49_408),
        "hidden_size": width,
        "intermediate_size": int(width * given.get("mlp_ratio", 4.0)),
        "num_hidden_layers": given.get("layers", 12),
        "num_attention_heads": given.get("heads", 8),
        "max_position_embeddings": given.get("context_length", 77),
        "hidden_act": _activation(given, quick, {}),
        "layer_norm_eps": (given.get("norm_kwargs") or {}).get("eps", 1e-5),
    }
    options, name = given.get("tokenizer_kwargs") or {}, given.get("hf_tokenizer_name")
    if options.keys() - {"clean"}:
        raise ArtifactError(f"{source}: text_cfg.tokenizer_kwargs={options} is not supported")
    if not copy_tokenizer(source, folder):
        if name:
            raise ArtifactError(
                f"{source} has no tokenizer: put the files of {name} into the folder"
            )
        write_clip_tokenizer(source, folder)
    if name:
        clean(source, folder, options.get("clean", "whitespace"))
    pool, causal = given.get("pool_type", "argmax"), not given.get("no_causal_mask", False)
    if causal and pool in ("argmax", "eos"):
        end = given.get("eos_id", 2) if pool == "eos" else None
        return clip_text(source, folder, sizes, state, theirs, end)
    if not causal and pool == "last":
        return siglip_text(source, folder, sizes, state, theirs)
    raise ArtifactError(
        f"{source}: the text tower has pool_type={pool} and no_causal_mask={not causal}, which are "
        "not supported together"
    )


def fits(source: Source) -> bool:
    """Tell if a folder is of open_clip; many contain transformers' CLIPModel, too."""
    own = [name for name in source.files if name.startswith("open_clip_")]
    return CONFIG in own and (not source.kind or any(".safetensors" in name for name in own))


FAMILY = Family("open_clip", fits, read)
