"""Folders as libraries publish them, with small random weights, and their libraries' own models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

SIDE = 32
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
TEXTS = ["a dog on a beach", "Red, and BLUE  things! it's", "many words " * 60, ""]
VISION = {
    "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 24, "pad_token_id": 1,
}  # fmt: skip
OPEN_CLIP = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 2},
}
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@register_model
def tiny_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SigLIP's image tower, made small; open_clip creates it by this name."""
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": SIDE}
    fixed = {"class_token": False, "global_pool": "map"}
    own = {
        key: value for key, value in kwargs.items() if not key.startswith(("pretrained_", "cache_"))
    }
    model = VisionTransformer(**{**sizes, **fixed, **own})
    model.default_cfg = model.pretrained_cfg = {"input_size": (3, SIDE, SIDE), "num_classes": 0}
    return model


def tokenizer(end: int, vocabulary: int = 300) -> Any:
    """Make a byte-level tokenizer that ends every caption with token `end`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"<{number}>" for number in range(vocabulary)]
    free = [number for number in range(vocabulary) if number not in (1, end)]
    for letter, number in zip(alphabet, free, strict=False):
        words[number] = letter
    words[1], words[end] = "<pad>", "</s>"
    own = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    own.normalizer = normalizers.Lowercase()
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", end)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="</s>"
    )


@dataclass
class Released:
    """A published folder and its library's functions, on normalised pixels and on texts."""

    folder: Path
    image: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Tensor] | None = None
    logits: Callable[[Tensor, list[str]], Tensor] | None = None
    model: Any = None


def normalised(pixels: Tensor) -> Tensor:
    """Normalise images [B, 1, 3, S, S] uint8 as the folders say."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (pixels[:, 0].float() / 255 - mean) / std


def shaken(model: Any, seed: int = 0) -> Any:
    """Change all weights, also those that are usually 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def of_open_clip(folder: Path, kind: str = "clip") -> Released:
    """Write a folder of open_clip: clip, siglip, worldwide (MetaCLIP 2) or plain."""
    config = json.loads(json.dumps(OPEN_CLIP))
    folder.mkdir()
    if kind == "clip":
        config["quick_gelu"] = True
    if kind == "plain":
        config["vision_cfg"] |= {"no_ln_pre": True, "ls_init_value": 0.1, "mlp_ratio": 2.5}
        config["custom_text"] = True
    if kind == "worldwide":
        tokenizer(end=2).save_pretrained(folder)
        config["text_cfg"] |= {"vocab_size": 300, "pool_type": "eos", "eos_id": 2}
        config["text_cfg"] |= {"hf_tokenizer_name": str(folder)}
    if kind == "siglip":
        tokenizer(end=2).save_pretrained(folder)
        config |= {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True}
        config["vision_cfg"] = {
            "image_size": SIDE, "timm_model_name": "tiny_siglip", "timm_pool": "map",
            "timm_proj": "none",
        }  # fmt: skip
        config["text_cfg"] |= {
            "context_length": 24, "vocab_size": 300, "hf_tokenizer_name": str(folder),
            "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True,
            "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        }  # fmt: skip
    mode = "squash" if kind == "siglip" else "shortest"
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": mode}
    content = {"model_cfg": config, "preprocess_cfg": {**preprocess, "size": SIDE}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    model = shaken(open_clip.create_model(f"local-dir:{folder}"))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    read = open_clip.get_tokenizer(f"local-dir:{folder}")
    return Released(
        folder,
        lambda pixels: model.encode_image(pixels, normalize=True),
        lambda texts: model.encode_text(read(texts), normalize=True),
        lambda pixels, texts: model.get_logits(pixels, read(texts))[0],
        model,
    )


def of_transformers(folder: Path, name: str) -> Released:
    """Write a folder of transformers' two-tower model of this name."""
    siglip, end = name.startswith("Siglip"), 299
    text = {**TEXT, "vocab_size": 300, "eos_token_id": end, "bos_token_id": 0}
    image: dict[str, Any] = dict(VISION)
    if siglip:
        text["projection_size"] = image["hidden_size"]
    if name == "Siglip2Model":
        image.pop("image_size")
        image["num_patches"] = (SIDE // 8) ** 2
    more = {} if siglip else {"projection_dim": 48}
    config = getattr(transformers, name.replace("Model", "Config"))
    model = shaken(
        getattr(transformers, name)(config(text_config=text, vision_config=image, **more))
    )
    model.save_pretrained(folder)
    own = tokenizer(end)
    own.save_pretrained(folder)
    write_processor(folder, squash=name == "SiglipModel")

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        padding = "max_length" if siglip else True
        read = own(texts, padding=padding, truncation=True, max_length=24, return_tensors="pt")
        return {"input_ids": read["input_ids"]} if siglip else dict(read)

    def pixel_inputs(pixels: Tensor) -> dict[str, Tensor]:
        if name != "Siglip2Model":
            return {"pixel_values": pixels}
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
        side = SIDE // 8
        return {
            "pixel_values": patches.reshape(len(pixels), side**2, -1),
            "pixel_attention_mask": torch.ones(len(pixels), side**2),
            "spatial_shapes": torch.tensor([[side, side]] * len(pixels)),
        }

    def run(pixels: Tensor, texts: list[str]) -> Any:
        return model(**tokens(texts), **pixel_inputs(pixels))

    return Released(
        folder,
        lambda pixels: run(pixels, ["a"]).image_embeds,
        lambda texts: run(torch.zeros(1, 3, SIDE, SIDE), texts).text_embeds,
        lambda pixels, texts: run(pixels, texts).logits_per_image,
        model,
    )


def write_processor(folder: Path, squash: bool) -> None:
    """Write preprocessor_config.json as transformers does."""
    size = {"height": SIDE, "width": SIDE} if squash else {"shortest_edge": SIDE}
    content = {"do_normalize": True, "image_mean": MEAN, "image_std": STD, "size": size}
    content |= {"do_resize": True, "resample": 3, "do_center_crop": not squash}
    content |= {} if squash else {"crop_size": {"height": SIDE, "width": SIDE}}
    content["image_processor_type"] = "ViTImageProcessor" if squash else "CLIPImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def of_backbone(folder: Path, name: str) -> Released:
    """Write a folder of transformers' backbone of this name; its feature is the CLS token."""
    sizes: dict[str, Any] = {**VISION}
    name, _, gated = name.partition(" ")  # the largest ones have SwiGLU
    if name.startswith("DINOv3"):
        sizes |= {"num_register_tokens": 4, "intermediate_size": 96}
        sizes |= {"use_gated_mlp": True, "hidden_act": "silu"} if gated else {}
    else:
        sizes["qkv_bias"] = name != "ViTModel"
    if name.startswith("Dinov2"):
        sizes.pop("intermediate_size")
        sizes |= {"use_swiglu_ffn": True} if gated else {}
    config = getattr(transformers, name.replace("Model", "Config"))(**sizes)
    model = shaken(getattr(transformers, name)(config))
    model.save_pretrained(folder)
    write_processor(folder, squash=True)
    feature = lambda pixels: nn.functional.normalize(  # noqa: E731
        model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1
    )
    return Released(folder, feature, model=model)


def of_timm(folder: Path, name: str = "vit_base_patch16_224") -> Released:
    """Write a folder of timm as its push_to_hf_hub does, without its pooling."""
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": SIDE}
    model = shaken(timm.create_model(name, num_classes=7, **sizes))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": name,
        "num_classes": 7,
        "model_args": sizes,
        "pretrained_cfg": {
            "input_size": [3, SIDE, SIDE], "mean": MEAN, "std": STD, "interpolation": "bicubic",
            "crop_pct": 0.9, "crop_mode": "center", "license": "apache-2.0",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))

    def feature(pixels: Tensor) -> Tensor:
        hidden: Tensor = model.forward_head(model.forward_features(pixels), pre_logits=True)
        return nn.functional.normalize(hidden, dim=-1)

    return Released(folder, feature, model=model)


def of_sentences(folder: Path, pooling: str = "cls") -> Released:
    """Write a BERT as sentence-transformers publishes one; pooling: cls or mean."""
    config = transformers.BertConfig(**{**TEXT, "vocab_size": 300, "max_position_embeddings": 40})
    model = shaken(transformers.BertModel(config, add_pooling_layer=False))
    model.save_pretrained(folder)
    own = tokenizer(end=2)
    own.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    modes = {
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling != "cls",
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (folder / "modules.json").write_text(json.dumps([{"type": "Transformer"}, {"type": "Pooling"}]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A sentence encoder\n")

    def text(texts: list[str]) -> Tensor:
        read = own(texts, padding=True, truncation=True, max_length=20, return_tensors="pt")
        hidden = model(**read).last_hidden_state
        mask = read["attention_mask"][..., None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return nn.functional.normalize(hidden[:, 0] if pooling == "cls" else mean, dim=-1)

    return Released(folder, lambda pixels: pixels, text, model=model)
