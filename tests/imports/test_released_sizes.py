"""Released sizes, built on meta tensors by their libraries: every tensor has a place in ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from released import tokenizer, write_processor

from xray.imports.convert import decided, family_of, inflated, joint_space
from xray.imports.source import Source, open_source
from xray.imports.texts import write_clip_tokenizer

SCALARS = {"logit_scale": torch.tensor(4.6), "logit_bias": torch.tensor(-10.0)}
OPEN_CLIP = {  # published as
    "ViT-B-32-quickgelu": "CLIP",
    "ViT-L-14-336-quickgelu": "CLIP",
    "ViT-bigG-14": "LAION",
    "ViT-H-14-378-quickgelu": "DFN",
    "ViT-H-14-worldwide-quickgelu": "MetaCLIP 2",
    "ViT-SO400M-14-SigLIP-384": "SigLIP",
    "ViT-B-16-SigLIP2-512": "SigLIP 2",
    "ViT-gopt-16-SigLIP2-256": "SigLIP 2",
    "EVA02-B-16": "EVA-02",
    "PE-Core-B-16": "PE",
    "MobileCLIP-B": "",
}
B32 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 32}
L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14,
       "num_attention_heads": 16}  # fmt: skip
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
          "num_attention_heads": 16}  # fmt: skip
TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12}  # fmt: skip
TEXT_SO = {**SO400M, "vocab_size": 256_000}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip-vit-base-patch32": ("CLIPModel", {"vision_config": B32, "projection_dim": 512}),
    "clip-vit-large-patch14-336": (
        "CLIPModel",
        {"vision_config": {**L14, "image_size": 336}, "text_config": TEXT_L, "projection_dim": 768},
    ),
    "metaclip-2-worldwide-l14": (
        "MetaClip2Model",
        {
            "vision_config": L14,
            "text_config": {**TEXT_L, "vocab_size": 901_629, "eos_token_id": 2},
            "projection_dim": 768,
        },
    ),
    "siglip-so400m-patch14-384": (
        "SiglipModel",
        {"vision_config": {**SO400M, "patch_size": 14, "image_size": 384}, "text_config": SO400M},
    ),
    "siglip2-so400m-patch16-naflex": (
        "Siglip2Model",
        {"vision_config": {**SO400M, "patch_size": 16}, "text_config": TEXT_SO},
    ),
    "vit-large-patch16-224": ("ViTModel", {**L14, "patch_size": 16}),
    "dinov2-base": ("Dinov2Model", {"image_size": 518, "patch_size": 14, "qkv_bias": True}),
    "vit-mae-base": ("ViTMAEForPreTraining", {}),
    "dinov2-giant": (
        "Dinov2Model",
        {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24,
         "image_size": 518, "patch_size": 14, "use_swiglu_ffn": True, "hidden_act": "silu"},
    ),
    "dinov2-with-registers-large": (
        "Dinov2WithRegistersModel",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "image_size": 518, "patch_size": 14},
    ),
    "dinov3-vith16plus-pretrain-lvd1689m": (
        "DINOv3ViTModel",
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
         "num_attention_heads": 20, "use_gated_mlp": True, "hidden_act": "silu",
         "num_register_tokens": 4},
    ),
}  # fmt: skip
TIMM = (
    "vit_base_patch16_224.mae",
    "vit_large_patch14_reg4_dinov2.lvd142m",
    "deit3_base_patch16_224",
    "vit_base_patch16_siglip_224.webli",
    "vit_base_patch16_clip_224.openai",
)


def check(folder: Path, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the shapes of a model; an unused, missing or wrong tensor raises an error."""
    state = model.state_dict()
    state |= {name: value for name, value in SCALARS.items() if name in state}
    monkeypatch.setattr(Source, "tensors", lambda self: dict(state))
    source = open_source(str(folder))
    texts = folder.parent / "texts"
    texts.mkdir()
    imported = family_of(source).read(source, texts)
    assert imported.vision is not None
    inflated(source, decided(imported.vision))
    if imported.joint is not None:
        joint_space(source, imported)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_clip.get_model_config(name)
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    if "hf_tokenizer_name" in config["text_cfg"]:
        tokenizer(end=2).save_pretrained(folder)
    else:
        write_clip_tokenizer(open_source(str(folder)), folder)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        model = kind(**config)
    if name == "MobileCLIP-B":
        with pytest.raises(Exception, match="vit_base_mci_224"):
            check(folder, model, monkeypatch)
        return
    check(folder, model, monkeypatch)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = TRANSFORMERS[name]
    named = kind.replace("ForPreTraining", "Model").replace("Model", "Config")
    config = getattr(transformers, named)(**settings)
    config.save_pretrained(tmp_path / "released")
    folder = tmp_path / "released"
    write_processor(folder, squash=False)
    if kind == "CLIPModel":
        write_clip_tokenizer(open_source(str(folder)), folder)
    else:
        tokenizer(end=2).save_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    monkeypatch.setattr(model, "state_dict", lambda: on_disk(model))
    check(folder, model, monkeypatch)


def on_disk(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's tensors by the names that transformers writes."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, torch.nn.Module.state_dict(model)))


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    folder = tmp_path / "released"
    folder.mkdir()
    config = {"architecture": name.partition(".")[0], "pretrained_cfg": model.pretrained_cfg}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    check(folder, model, monkeypatch)
