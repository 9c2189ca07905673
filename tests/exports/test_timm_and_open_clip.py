"""Exports to timm and open_clip compared with our features and evaluations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from export_checks import SIDE, TOLERANCE, code_of, normalised, pixels_of, rewritten
from in_process import invoke
from PIL import Image

from data_pipelines.decode.preparation import resized_side
from data_pipelines.shards.source import open_source
from xray.api import Model, load
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, VisionEncoder, restore_encoder
from xray.config import DataConfig, ModelConfig
from xray.config import loading as cfg
from xray.errors import ArtifactError
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.feature_extraction import read_all_captions
from xray.exports.convert import convert
from xray.exports.open_clip_towers import unsupported_vision
from xray.exports.to_timm import _crop_pct
from xray.models.backbone import VisionBackbone


def test_timm_gives_our_features(demo: Path, tagger: Path, tmp_path: Path) -> None:
    done = invoke("export", tagger, "--to", "timm", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    artifact = open_artifact(tagger)
    pixels = pixels_of(demo)
    names: dict[str, Any] = {"image": Image.fromarray(pixels[0, 0].permute(1, 2, 0).numpy())}
    exec(code_of(tmp_path / "out" / "README.md"), names)
    vit = names["model"]
    assert type(vit).__name__ == "VisionTransformer" and vit.num_classes == 0
    with torch.no_grad():
        theirs = vit(normalised(pixels, artifact))
    expected = load(tagger, keep_rate=1.0).encode_image(pixels[:, 0])
    torch.testing.assert_close(F.normalize(theirs, dim=-1), expected, rtol=0, atol=TOLERANCE)
    # the same with the transform of timm, on an image that needs no resizing
    own = F.normalize(names["features"], dim=-1)
    torch.testing.assert_close(own, expected[:1], rtol=0, atol=TOLERANCE)


def test_open_clip_gives_our_image_and_text_features(
    demo: Path, control: Path, open_clip_export: Path
) -> None:
    artifact, pixels = open_artifact(control), pixels_of(demo)
    picture = Image.fromarray(pixels[3, 0].permute(1, 2, 0).numpy())
    names: dict[str, Any] = {"picture": picture}
    exec(code_of(open_clip_export / "README.md"), names)
    ours = load(control)
    close: dict[str, Any] = {"rtol": 0, "atol": TOLERANCE}
    torch.testing.assert_close(names["image"], ours.encode_image(picture), **close)
    torch.testing.assert_close(names["text"], ours.encode_text("a dog on a beach"), **close)
    texts = [
        texts[0] for texts in read_all_captions(open_source("s", "heldout", "image", str(demo)))
    ]
    with torch.no_grad():
        images = names["model"].encode_image(normalised(pixels, artifact), normalize=True)
        theirs = names["model"].encode_text(names["tokenizer"](texts), normalize=True)
    torch.testing.assert_close(images, ours.encode_image(pixels[:, 0]), **close)
    torch.testing.assert_close(theirs, ours.encode_text(texts), **close)
    scale = names["model"].logit_scale.exp().item()
    assert scale == pytest.approx(ours.artifact.load("head")["logit_scale"].exp().item())


def test_the_open_clip_export_has_our_evaluation_results(
    demo: Path, control: Path, open_clip_export: Path
) -> None:
    """Zero-shot and retrieval are computed as in CLIP_benchmark, by open_clip and numpy only."""
    sets = {
        "retrieval": {"shards": "heldout"},
        "zero_shot": {
            "shards": "heldout",
            "classes": "classes.txt",
            "templates": ["a {}", "one {}"],
        },
    }
    artifact = open_artifact(control)
    encoder: Any = restore_encoder(artifact)
    ours = Evaluator(encoder, cfg.build(EvalConfig, sets), str(demo), 0).run([*sets])
    model = open_clip.create_model(f"local-dir:{open_clip_export}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{open_clip_export}")

    def read(texts: list[str]) -> np.ndarray:
        with torch.no_grad():
            return model.encode_text(tokenizer(texts), normalize=True).numpy()

    source = open_source("s", "heldout", "image", str(demo))
    with torch.no_grad():
        images = model.encode_image(normalised(pixels_of(demo), artifact), normalize=True).numpy()
    captions = read_all_captions(source)
    owner = np.concatenate([[i] * len(own) for i, own in enumerate(captions)])
    scores = read([text for own in captions for text in own]) @ images.T
    for k in (1, 5, 10):
        hits = np.argsort(-scores, axis=1, kind="stable")[:, :k] == owner[:, None]
        assert ours["retrieval"][f"text_to_image_R@{k}"] == pytest.approx(
            hits.any(1).mean(), abs=1e-6
        )
        first = owner[np.argsort(-scores.T, axis=1, kind="stable")[:, :k]]
        hits = (first == np.arange(len(images))[:, None]).any(1)
        assert ours["retrieval"][f"image_to_text_R@{k}"] == pytest.approx(hits.mean(), abs=1e-6)
    classes = (demo / "classes.txt").read_text().split("\n")
    prompts = [[f"a {name}", f"one {name}"] for name in classes if name]
    weights = np.stack([read(each).mean(0) for each in prompts])
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    labels = [
        json.loads(source.read(*place, ("json",))["json"])["label"] for place in source.places()
    ]
    hits = (images @ weights.T).argmax(1) == np.array(labels)
    assert ours["zero_shot"]["top1"] == pytest.approx(hits.mean(), abs=1e-6)


def test_a_text_tower_that_open_clip_lacks_is_left_out(
    demo: Path, control: Path, tmp_path: Path
) -> None:
    encoder: Any = restore_encoder(open_artifact(control))
    head = open_artifact(control).load("head")
    head = {k: v for k, v in head.items() if not k.startswith("text_adapter")}
    adapter = cfg.merge(
        open_artifact(control).manifest["config"], {"clip": {"text_head": "adapter"}}
    )
    other = rewritten(control, tmp_path / "other", adapter, {"head": head})
    done = invoke("export", other.path, "--to", "open_clip", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "clip.text_head=linear is CLIP's own" in done.stdout
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    pixels = pixels_of(demo)
    with torch.no_grad():
        theirs = model.encode_image(normalised(pixels, other), normalize=True)
    expected = encoder.encode_pixels(pixels)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(TypeError, match="this_model_has_no_text_tower"):
        open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    for tokens in (torch.zeros(1, 1, dtype=torch.long), open_clip.tokenize(["a dog"])):
        with pytest.raises(AssertionError):
            model.encode_text(tokens)
    assert "this_model_has_no_text_tower" in (tmp_path / "out" / "README.md").read_text()


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PATCH = {"patch_size": 8, **SMALL}
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"name": "vit_tiny_patch16_224", "kwargs": PATCH}, ""),
    "frames": ({"name": "vit_tiny_patch16_224", "kwargs": PATCH, "video": "frames"}, ""),
    "attended frames": (
        {"name": "vit_tiny_patch16_224", "kwargs": PATCH, "video": "frames",
         "frame_pool": "attention"}, "",
    ),
    "pre-norm": ({"name": "vit_base_patch16_clip_224", "kwargs": PATCH}, ""),
    "averaged": ({"name": "vit_tiny_patch16_224", "kwargs": {**PATCH, "global_pool": "avg"}}, ""),
    "layer scale": ({"name": "deit3_small_patch16_224", "kwargs": PATCH}, ""),
    "no CLS": ({"name": "vit_base_patch16_siglip_224", "kwargs": PATCH}, ""),
    "attention pooling": (
        {"name": "vit_base_patch16_siglip_224", "kwargs": PATCH, "pool": "map"},
        "without model.kwargs",
    ),
    "mean": (
        {"name": "vit_base_patch16_siglip_224", "kwargs": PATCH, "pool": "mean"}, "no CLS token",
    ),
    "mean beside CLS": ({"name": "vit_tiny_patch16_224", "kwargs": PATCH, "pool": "mean"}, ""),
    "mean of normed": (
        {"name": "vit_tiny_patch16_224", "kwargs": {**PATCH, "fc_norm": False}, "pool": "mean"}, "",
    ),
    "rotary": ({"name": "vit_small_patch16_dinov3", "kwargs": PATCH}, "without model.kwargs"),
    "rotary, added CLS": (
        {"name": "vit_medium_patch16_rope_reg1_gap_256", "kwargs": PATCH}, "without model.kwargs",
    ),
    "rotary, mean": (
        {"name": "eva02_tiny_patch14_224", "kwargs": PATCH, "pool": "mean"},
        "without model.kwargs",
    ),
    "registers": ({"name": "vit_small_patch14_reg4_dinov2", "kwargs": PATCH}, "register tokens"),
    "qk-norm": (
        {"name": "vit_tiny_patch16_224", "kwargs": {**PATCH, "qk_norm": True}}, "normalisation",
    ),
    "swiglu": ({"name": "vit_giant_patch14_dinov2", "kwargs": PATCH}, "not two linear"),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_each_backbone_variant_is_exact_or_refused(
    demo: Path, control: Path, tmp_path: Path, shape: str
) -> None:
    """All weights are random, so that those that are usually 0 or 1 are tested as well."""
    model, reason = SHAPES[shape]
    old = open_artifact(control).manifest["config"]
    config = {**old, "model": {**old["model"], "frame_pool": "mean", "video": "joint", **model}}
    torch.manual_seed(0)
    vision = VisionBackbone(ModelConfig(**config["model"]), SIDE, 4)
    state = {k: v + 0.1 * torch.randn_like(v) for k, v in vision.state_dict().items()}
    artifact = rewritten(control, tmp_path / "artifact", config, {"backbone": state})
    pixels = pixels_of(demo)
    encoder = VisionEncoder(artifact)
    convert(artifact, "timm", tmp_path / "timm")
    vit: Any = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        theirs = F.normalize(vit(normalised(pixels, artifact)), dim=-1)
    torch.testing.assert_close(theirs, encoder.features(pixels), rtol=0, atol=TOLERANCE)
    if reason:
        with pytest.raises(ArtifactError, match=f"cannot be open_clip's ViT: .*{reason}"):
            convert(artifact, "open_clip", tmp_path / "open_clip")
        return
    convert(artifact, "open_clip", tmp_path / "open_clip")
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
    with torch.no_grad():
        theirs = clip.encode_image(normalised(pixels, artifact), normalize=True)
    joint: Any = restore_encoder(artifact)
    assert isinstance(joint, Encoder) and not unsupported_vision(joint)
    torch.testing.assert_close(theirs, joint.encode_pixels(pixels), rtol=0, atol=TOLERANCE)


def test_after_a_resolution_schedule_timm_gets_the_final_positions(
    demo: Path, tagger: Path, tmp_path: Path
) -> None:
    """The position table has the largest size; models are evaluated and exported at the last."""
    old = open_artifact(tagger).manifest["config"]
    own = {"resolution": [[0.0, 32], [0.5, 48], [0.9, 32]]}
    config = cfg.merge(old, {"data": own, "model": {"norm_eps": 1e-12}})
    backbone = open_artifact(tagger).load("backbone")
    backbone["pos_embed"] = torch.randn(1, 1 + 36, 32)
    artifact = rewritten(tagger, tmp_path / "artifact", config, {"backbone": backbone})
    notes = convert(artifact, "timm", tmp_path / "timm").notes
    assert "the epsilon 1e-12 (model.norm_eps), and 1e-06 in timm" in "".join(notes)
    vit: Any = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert vit.pos_embed.shape == (1, 1 + 16, 32)
    pixels = pixels_of(demo)
    with torch.no_grad():
        theirs = F.normalize(vit(normalised(pixels, artifact)), dim=-1)
    expected = Model(artifact, "cpu", 1.0).encode_image(pixels[:, 0])
    torch.testing.assert_close(theirs, expected, rtol=0, atol=TOLERANCE)


def test_timm_computes_the_size_before_the_crop() -> None:
    """It rounds down: 64 / (64 / 93) is 92.99..., for which it would take 92."""
    for whole in range(64, 128):
        data = DataConfig(crop_pct=64 / whole)
        assert resized_side(data, 64) == math.floor(64 / _crop_pct(data, 64)) == whole
    assert _crop_pct(DataConfig(crop_pct=0.9), 224) == 0.9


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_other_libraries_prepare_photos_as_the_artifact(
    resize: str, control: Path, tmp_path: Path
) -> None:
    config = json.loads(json.dumps(open_artifact(control).manifest["config"]))
    config["data"] |= {"resize": resize, "interpolation": "bilinear", "crop_pct": 0.9}
    artifact = rewritten(control, tmp_path / "artifact", config, {})
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), np.uint8))
    convert(artifact, "timm", tmp_path / "timm")
    names: dict[str, Any] = {"image": photo}
    exec(code_of(tmp_path / "timm" / "README.md"), names)
    vision = load(artifact.path)
    pixels = vision.preprocess(photo)
    given = normalised(pixels[None, None], artifact)
    torch.testing.assert_close(names["preprocess"](photo)[None], given, rtol=0, atol=1e-6)
    # open_clip has no share of the short side
    note = "open_clip's preprocessing has no crop of 0.9"
    assert note in "".join(convert(artifact, "open_clip", tmp_path / "with_note").notes)
    config["data"]["crop_pct"] = 1.0
    artifact = rewritten(control, tmp_path / "whole", config, {})
    convert(artifact, "open_clip", tmp_path / "open_clip")
    names = {"picture": photo}
    exec(code_of(tmp_path / "open_clip" / "README.md"), names)
    expected = load(artifact.path).encode_image(photo)
    torch.testing.assert_close(names["image"], expected, rtol=0, atol=TOLERANCE)
