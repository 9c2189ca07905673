"""Exports that transformers' AutoModel and AutoProcessor load, compared with our features."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_checks import SIDE, TOLERANCE, code_of, normalised, pixels_of, rewritten
from in_process import invoke
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from xray.api import load
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import VisionEncoder, restore_encoder
from xray.config import ModelConfig
from xray.config import loading as cfg
from xray.errors import ArtifactError
from xray.exports import common
from xray.exports.convert import convert
from xray.imports.convert import import_model
from xray.models.backbone import VisionBackbone

PATCH = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
DUAL = "VisionTextDualEncoderModel"
# model section -> class of transformers and type of its image tower, or the reason of a refusal
SHAPES: dict[str, tuple[dict[str, Any], str, str]] = {
    "plain": ({"name": "vit_tiny_patch16_224"}, DUAL, "vit"),
    "pre-norm": ({"name": "vit_base_patch16_clip_224"}, "CLIPModel", "clip_vision_model"),
    "quick": ({"name": "vit_base_patch16_clip_quickgelu_224"}, "CLIPModel", "clip_vision_model"),
    "layer scale": ({"name": "deit3_small_patch16_224"}, DUAL, "dinov2"),
    "registers": ({"name": "vit_small_patch14_reg4_dinov2"}, DUAL, "dinov2_with_registers"),
    "positions of registers": (
        {"name": "vit_tiny_patch16_224", "kwargs": {"reg_tokens": 2}}, DUAL,
        "dinov2_with_registers",
    ),
    "no bias": ({"name": "vit_tiny_patch16_224", "kwargs": {"qkv_bias": False}}, DUAL, "vit"),
    "averaged": ({"name": "vit_tiny_patch16_224", "kwargs": {"global_pool": "avg"}}, DUAL, "vit"),
    "tanh": ({"name": "vit_tiny_patch16_224", "kwargs": {"act_layer": "gelu_tanh"}}, DUAL, "vit"),
    "qk-norm": (
        {"name": "vit_tiny_patch16_224", "kwargs": {"qk_norm": True}}, "", "normalisation layers",
    ),
    "swiglu": (
        {"name": "vit_giant_patch14_dinov2", "kwargs": {"mlp_ratio": 5.5}}, DUAL, "dinov2",
    ),
    "swiglu of another width": ({"name": "vit_giant_patch14_dinov2"}, "", "MLP ratio is not a"),
    "relu": (
        {"name": "vit_tiny_patch16_224", "kwargs": {"act_layer": "relu"}}, "", "not two linear",
    ),
    "mean": (
        {"name": "vit_base_patch16_siglip_224", "pool": "mean"}, "", "the mean of the tokens",
    ),
    "pre-norm with layer scale": (
        {"name": "vit_base_patch16_clip_224", "kwargs": {"init_values": 0.1}}, "",
        "and a norm before its blocks",
    ),
}  # fmt: skip


def of_shape(control: Path, out: Path, model: dict[str, Any]) -> Artifact:
    """A clip artifact with another image tower; all of its weights are random."""
    old = open_artifact(control).manifest["config"]
    own = {**model, "kwargs": {**PATCH, **model.get("kwargs", {})}}
    config = {**old, "model": {**old["model"], **own}}
    torch.manual_seed(0)
    vision = VisionBackbone(ModelConfig(**config["model"]), SIDE, 4)
    state = {k: v + 0.1 * torch.randn_like(v) for k, v in vision.state_dict().items()}
    return rewritten(control, out, config, {"backbone": state})


def auto(folder: Path) -> Any:
    """Load an export as its users do, and check that no weight is missing or left over."""
    from transformers import AutoModel

    model, told = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_each_backbone_variant_is_exact_or_refused(
    demo: Path, control: Path, tmp_path: Path, shape: str
) -> None:
    model, name, tower = SHAPES[shape]
    artifact, out = of_shape(control, tmp_path / "artifact", model), tmp_path / "out"
    if not name:
        with pytest.raises(ArtifactError, match=f"cannot be a model of transformers: .*{tower}"):
            convert(artifact, "transformers", out)
        assert not out.exists()
        return
    convert(artifact, "transformers", out)
    loaded = auto(out)
    assert type(loaded).__name__ == name and loaded.config.vision_config.model_type == tower
    pixels = pixels_of(demo)
    with torch.no_grad():
        found = loaded.get_image_features(normalised(pixels, artifact)).pooler_output
    joint: Any = restore_encoder(artifact)
    joint.keep_rate = 1.0
    expected = joint.encode_pixels(pixels)
    torch.testing.assert_close(F.normalize(found, dim=-1), expected, rtol=0, atol=TOLERANCE)


def test_the_code_of_the_card_gives_our_features(demo: Path, control: Path, tmp_path: Path) -> None:
    done = invoke("export", control, "--to", "transformers", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    pixels = pixels_of(demo)
    picture = Image.fromarray(pixels[3, 0].permute(1, 2, 0).numpy())
    names: dict[str, Any] = {"picture": picture}
    exec(code_of(tmp_path / "out" / "README.md"), names)
    ours = load(control)
    close: dict[str, Any] = {"rtol": 0, "atol": TOLERANCE}
    torch.testing.assert_close(names["image"], ours.encode_image(picture), **close)
    torch.testing.assert_close(names["text"], ours.encode_text("a dog on a beach"), **close)
    prepared = names["processor"](images=[picture], return_tensors="pt")["pixel_values"]
    expected = normalised(pixels[3:4], ours.artifact)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)
    scale = ours.artifact.load("head")["logit_scale"].exp()
    logits = scale * names["image"] @ names["text"].T
    torch.testing.assert_close(names["outputs"].logits_per_image, logits, rtol=0, atol=1e-4)


def test_the_preparation_of_pictures_is_the_artifacts(control: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    old = open_artifact(control).manifest["config"]
    own = {"resize": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
    config = cfg.merge(old, {"data": own})
    artifact = rewritten(control, tmp_path / "artifact", config, {})
    convert(artifact, "transformers", tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = Image.linear_gradient("L").convert("RGB").resize((70, 40))
    theirs = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    ours = (load(str(artifact.path)).preprocess(picture).float() / 255 - 0.5) / 0.25
    assert theirs.shape == ours.shape and (theirs - ours).abs().mean() < 0.02


def test_a_text_tower_that_transformers_lacks_is_left_out(
    demo: Path, control: Path, tmp_path: Path
) -> None:
    head = open_artifact(control).load("head")
    head = {k: v for k, v in head.items() if not k.startswith("text_adapter")}
    old = open_artifact(control).manifest["config"]
    config = cfg.merge(old, {"clip": {"text_head": "adapter"}})
    other = rewritten(control, tmp_path / "other", config, {"head": head})
    done = invoke("export", other.path, "--to", "transformers", "--out", tmp_path / "out")
    assert done.exit_code == 0 and "only the image tower" in done.stdout, done.output
    pixels = pixels_of(demo)
    with torch.no_grad():
        theirs = auto(tmp_path / "out")(normalised(pixels, other)).pooler_output
    encoder: Any = restore_encoder(open_artifact(control))
    expected = encoder.encode_pixels(pixels)
    torch.testing.assert_close(F.normalize(theirs, dim=-1), expected, rtol=0, atol=TOLERANCE)


def test_a_backbone_in_several_files_loads_without_its_reduction(
    demo: Path, tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "SHARD", 40_000)
    done = invoke("export", tagger, "--to", "transformers", "--out", tmp_path / "out")
    assert done.exit_code == 0 and "keep rate is 0.7" in " ".join(done.stdout.split())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 1 and {*index["weight_map"].values()} == {*files}
    loaded, artifact, pixels = auto(tmp_path / "out"), open_artifact(tagger), pixels_of(demo)
    assert type(loaded).__name__ == "ViTModel"
    with torch.no_grad():
        outputs = loaded(normalised(pixels, artifact))
    encoder = VisionEncoder(artifact)
    encoder.keep_rate = 1.0
    for theirs in (outputs.pooler_output, outputs.last_hidden_state[:, 0]):
        found = F.normalize(theirs, dim=-1)
        torch.testing.assert_close(found, encoder.features(pixels), rtol=0, atol=TOLERANCE)


def released(kind: str, folder: Path, words: Path) -> Any:
    """Save a small random model as its authors release theirs; words: folder of a tokenizer."""
    import transformers as hf

    image = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": SIDE, "patch_size": 8}  # fmt: skip
    tokenizer = hf.AutoTokenizer.from_pretrained(words, model_max_length=16)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
            "eos_token_id": tokenizer.eos_token_id, "projection_size": 32}  # fmt: skip
    wide = {**image, "intermediate_size": 64}
    tanh = {**wide, "hidden_act": "gelu_pytorch_tanh"}
    made: dict[str, Callable[[], Any]] = {
        "CLIPModel": lambda: hf.CLIPConfig(text_config=text, vision_config=wide, projection_dim=24),
        "SiglipModel": lambda: hf.SiglipConfig(text_config=text, vision_config=tanh),
        "ViTModel": lambda: hf.ViTConfig(**wide),
        "Dinov2Model": lambda: hf.Dinov2Config(**image),
        "Dinov2WithRegistersModel": lambda: hf.Dinov2WithRegistersConfig(
            **image, num_register_tokens=2
        ),
        "Dinov2Model with SwiGLU": lambda: hf.Dinov2Config(**image, use_swiglu_ffn=True),
        "DINOv3ViTModel": lambda: hf.DINOv3ViTConfig(**wide, num_register_tokens=2),
    }
    torch.manual_seed(0)
    model = getattr(hf, kind.split()[0])(made[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    square, shortest = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
    processor = hf.CLIPImageProcessor(size=shortest, crop_size=square)
    if kind == "SiglipModel":
        processor = hf.SiglipImageProcessor(size=square)
    processor.save_pretrained(folder)
    if kind in ("CLIPModel", "SiglipModel"):
        tokenizer.save_pretrained(folder)
    return model


UNUSED = ("pooler.", "embeddings.mask_token")  # parts that an import leaves out
KINDS = ("CLIPModel", "SiglipModel", "ViTModel", "Dinov2Model", "Dinov2WithRegistersModel",
         "Dinov2Model with SwiGLU", "DINOv3ViTModel")  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
def test_rotary_positions_of_dinov3_and_of_no_other_model(
    demo: Path, control: Path, tmp_path: Path, gated: bool
) -> None:
    model: dict[str, Any] = {"name": "vit_small_patch16_dinov3"}
    if gated:
        model["kwargs"] = {"swiglu_mlp": True, "swiglu_align_to": 8, "mlp_ratio": 2.0}
    artifact = of_shape(control, tmp_path / "artifact", model)
    export = convert(artifact, "transformers", tmp_path / "out")
    assert "no class of transformers joins DINOv3ViTModel" in export.notes[0]
    loaded, pixels = auto(tmp_path / "out"), pixels_of(demo)
    assert type(loaded).__name__ == "DINOv3ViTModel"
    with torch.no_grad():
        theirs = loaded(normalised(pixels, artifact)).pooler_output
    expected = VisionEncoder(artifact).features(pixels)
    torch.testing.assert_close(F.normalize(theirs, dim=-1), expected, rtol=0, atol=TOLERANCE)
    other = of_shape(control, tmp_path / "eva", {"name": "eva02_tiny_patch14_224"})
    with pytest.raises(ArtifactError, match=r"timm's Eva with other positions"):
        convert(other, "transformers", tmp_path / "eva_out")


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_the_source(
    demo: Path, control: Path, tmp_path: Path, kind: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = released(kind, source, control / "llm")
    artifact = import_model(str(source), tmp_path / "artifact", "mit")
    convert(artifact, "transformers", out)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() - after.keys() <= {"pooler.dense.weight", "pooler.dense.bias"}
    names = [name for name in before if not name.startswith(UNUSED)]
    assert all(torch.equal(before[name], after[name]) for name in names)
    loaded = auto(out)
    assert type(loaded) is type(model)
    pixels = {"pixel_values": normalised(pixels_of(demo), artifact)}
    with torch.no_grad():
        if kind not in ("CLIPModel", "SiglipModel"):
            theirs, ours = (m(**pixels).last_hidden_state for m in (model, loaded))
            assert torch.equal(theirs, ours)
            return
        processor = AutoProcessor.from_pretrained(out)
        padding = "max_length" if kind == "SiglipModel" else True
        tokens = processor(
            text=["a dog", "two red birds, and a very long caption " * 9],
            padding=padding, truncation=True, return_tensors="pt",
        )  # fmt: skip
        assert tokens["input_ids"].shape == (2, 16)
        assert ("attention_mask" in tokens) == (kind == "CLIPModel")
        theirs, ours = (m(**pixels, **tokens).logits_per_image for m in (model, loaded))
    assert torch.equal(theirs, ours)


def test_towers_of_two_families_are_not_joined(demo: Path, control: Path, tmp_path: Path) -> None:
    """SigLIP's image tower beside CLIP's text tower: no class of transformers has both."""
    model = {"name": "vit_base_patch16_siglip_224", "pool": "map"}
    artifact = of_shape(control, tmp_path / "artifact", model)
    export = convert(artifact, "transformers", tmp_path / "out")
    assert "no class joins SiglipVisionModel and CLIPTextModel" in export.notes[0]
    loaded, pixels = auto(tmp_path / "out"), pixels_of(demo)
    with torch.no_grad():
        theirs = loaded(normalised(pixels, artifact)).pooler_output
    encoder = VisionEncoder(artifact)
    expected = encoder.features(pixels)
    torch.testing.assert_close(F.normalize(theirs, dim=-1), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_the_processor_prepares_what_evaluation_does(
    control: Path, tmp_path: Path, resize: str
) -> None:
    """A share at which rounding to the nearest pixel gives 39, and rounding down 38 px."""
    shaped = of_shape(control, tmp_path / "shaped", {"name": "vit_base_patch16_clip_224"})
    config = copy.deepcopy(shaped.manifest["config"])
    config["data"] |= {"resize": resize, "crop_pct": 0.83}
    artifact = rewritten(shaped.path, tmp_path / "artifact", config, {})
    convert(artifact, "transformers", tmp_path / "out")
    processor, model = AutoProcessor.from_pretrained(tmp_path / "out"), load(artifact.path)
    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    size = (80, 80) if resize == "shortest" else (100, 80)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    found = processor(images=[picture], return_tensors="pt")["pixel_values"]
    expected = normalised(model.preprocess(picture)[None, None], artifact)
    grey_levels = 255 * min(config["data"]["std"]) * (found - expected).abs()
    assert grey_levels.mean() < 0.1 and grey_levels.max() < 5
    imported = import_model(str(tmp_path / "out"), tmp_path / "again", "mit").manifest["config"]
    assert math.floor(SIDE / imported["data"]["crop_pct"] + 1e-6) == 38
