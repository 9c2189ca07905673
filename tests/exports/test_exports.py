"""Exports, each against the library that loads it; the cards beside them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner, Result

from data_pipelines.shards.source import open_source
from xray.api import Model, load
from xray.artifacts.artifact import Artifact, open_artifact, write_artifact
from xray.artifacts.encoders import Encoder, VisionEncoder, restore_encoder
from xray.artifacts.model_card import artifact_card
from xray.commands.main import app
from xray.config import DataConfig, ModelConfig, TextConfig
from xray.config import loading as cfg
from xray.errors import ArtifactError
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.feature_extraction import extract, read_all_captions
from xray.exports import convert as converting
from xray.exports.convert import convert
from xray.exports.to_open_clip import no_plain_vit
from xray.models.backbone import VisionBackbone
from xray.models.text_tower import TextTower, merge_lora

SIDE = 32
TOLERANCE = 2e-6  # of unit-length features; the exporters refuse more than 1e-5


def xray(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(done: Result, words: str) -> None:
    assert done.exit_code == 2 and words in done.stderr, (done.stderr, done.exception)
    assert len(done.stderr.strip().splitlines()) == 1


def pixels_of(demo: Path, source: str = "heldout", modality: Any = "image") -> torch.Tensor:
    """All of a source as a model of SIDE px sees it, [B, T, 3, S, S] uint8."""
    opened = open_source("s", source, modality, str(demo))
    data = DataConfig(resolution=SIDE, frames=4, workers=0)
    return extract(opened, lambda pixels: pixels, data).rows


def normalised(pixels: torch.Tensor, artifact: Artifact) -> torch.Tensor:
    """[B, 3, S, S] as open_clip's and timm's transforms make them of the first frames."""
    data = artifact.manifest["config"]["data"]
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels[:, 0].float() / 255 - mean) / std


def code_of(card: Path) -> str:
    """The python block of a card, its folder filled in."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return str(code).replace("FOLDER", str(card.parent))


@pytest.fixture(scope="module")
def both(control: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The control, which has both towers, for open_clip."""
    out = tmp_path_factory.mktemp("exports") / "open_clip"
    convert(open_artifact(control), "open_clip", out)
    return out


# timm and open_clip -----------------------------------------------------------------------------


def test_timm_loads_it_and_gives_our_features(demo: Path, tagger: Path, tmp_path: Path) -> None:
    done = xray("export", tagger, "--to", "timm", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    artifact = open_artifact(tagger)
    pixels = pixels_of(demo)
    names: dict[str, Any] = {"image": Image.fromarray(pixels[0, 0].permute(1, 2, 0).numpy())}
    exec(code_of(tmp_path / "out" / "README.md"), names)
    vit = names["model"]
    assert type(vit).__name__ == "VisionTransformer" and vit.num_classes == 0
    with torch.no_grad():
        found = vit(normalised(pixels, artifact))
    expected = load(tagger, keep_rate=1.0).encode_image(pixels[:, 0])
    torch.testing.assert_close(F.normalize(found, dim=-1), expected, rtol=0, atol=TOLERANCE)
    # and its own transform, of a picture that needs no resizing
    own = F.normalize(names["features"], dim=-1)
    torch.testing.assert_close(own, expected[:1], rtol=0, atol=TOLERANCE)


def test_open_clip_loads_both_towers(demo: Path, control: Path, both: Path) -> None:
    artifact, pixels = open_artifact(control), pixels_of(demo)
    picture = Image.fromarray(pixels[3, 0].permute(1, 2, 0).numpy())
    names: dict[str, Any] = {"picture": picture}
    exec(code_of(both / "README.md"), names)
    ours = load(control)
    close: dict[str, Any] = {"rtol": 0, "atol": TOLERANCE}
    torch.testing.assert_close(names["image"], ours.encode_image(picture), **close)
    torch.testing.assert_close(names["text"], ours.encode_text("a dog on a beach"), **close)
    texts = [
        texts[0] for texts in read_all_captions(open_source("s", "heldout", "image", str(demo)))
    ]
    with torch.no_grad():
        images = names["model"].encode_image(normalised(pixels, artifact), normalize=True)
        found = names["model"].encode_text(names["tokenizer"](texts), normalize=True)
    torch.testing.assert_close(images, ours.encode_image(pixels[:, 0]), **close)
    torch.testing.assert_close(found, ours.encode_text(texts), **close)
    scale = names["model"].logit_scale.exp().item()
    assert scale == pytest.approx(ours.artifact.load("head")["logit_scale"].exp().item())


def test_the_open_clip_export_evaluates_alike(demo: Path, control: Path, both: Path) -> None:
    """Zero-shot and retrieval as CLIP_benchmark computes them, by open_clip and numpy alone."""
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
    model = open_clip.create_model(f"local-dir:{both}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{both}")

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
        found = np.argsort(-scores, axis=1, kind="stable")[:, :k] == owner[:, None]
        assert ours["retrieval"][f"text_to_image_R@{k}"] == pytest.approx(
            found.any(1).mean(), abs=1e-6
        )
        first = owner[np.argsort(-scores.T, axis=1, kind="stable")[:, :k]]
        found = (first == np.arange(len(images))[:, None]).any(1)
        assert ours["retrieval"][f"image_to_text_R@{k}"] == pytest.approx(found.mean(), abs=1e-6)
    classes = (demo / "classes.txt").read_text().split("\n")
    prompts = [[f"a {name}", f"one {name}"] for name in classes if name]
    weights = np.stack([read(each).mean(0) for each in prompts])
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    labels = [
        json.loads(source.read(*place, ("json",))["json"])["label"] for place in source.places()
    ]
    found = (images @ weights.T).argmax(1) == np.array(labels)
    assert ours["zero_shot"]["top1"] == pytest.approx(found.mean(), abs=1e-6)


def test_a_text_tower_that_open_clip_has_not_stays_out(
    demo: Path, control: Path, tmp_path: Path
) -> None:
    encoder: Any = restore_encoder(open_artifact(control))
    head = open_artifact(control).load("head")
    head = {k: v for k, v in head.items() if not k.startswith("text_adapter")}
    adapter = cfg.merge(
        open_artifact(control).manifest["config"], {"clip": {"text_head": "adapter"}}
    )
    other = rewritten(control, tmp_path / "other", adapter, {"head": head})
    done = xray("export", other.path, "--to", "open_clip", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "clip.text_head=linear is CLIP's own" in done.stdout
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    pixels = pixels_of(demo)
    with torch.no_grad():
        found = model.encode_image(normalised(pixels, other), normalize=True)
    expected = encoder.encode_pixels(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert model.encode_text(torch.zeros(1, 1, dtype=torch.long)).isnan().all()
    with pytest.raises(IndexError):
        model.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a dog"]))


def rewritten(
    path: Path, out: Path, config: dict[str, Any], parts: dict[str, dict[str, torch.Tensor]]
) -> Artifact:
    """An artifact with another config, and some parts' weights replaced."""
    old = open_artifact(path)
    own = {name: old.load(name) for name in old.manifest["tensors"]} | parts
    left_out = ("schema", "parents", "tensors", "files", "versions", "git_commit")
    facts = {k: v for k, v in old.manifest.items() if k not in left_out} | {"config": config}
    files = {
        name: old.path / name for name in old.manifest["files"] if name[:4] in ("llm/", "voca")
    }
    write_artifact(out, own, files, facts, {}, artifact_card)
    return open_artifact(out)


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
    "registers": ({"name": "vit_small_patch14_reg4_dinov2", "kwargs": PATCH}, "register tokens"),
    "qk-norm": (
        {"name": "vit_tiny_patch16_224", "kwargs": {**PATCH, "qk_norm": True}}, "norms of its own",
    ),
    "swiglu": ({"name": "vit_giant_patch14_dinov2", "kwargs": PATCH}, "no pair"),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_backbone_is_exact_or_refused(
    demo: Path, control: Path, tmp_path: Path, shape: str
) -> None:
    """All weights drawn at random, so that none that is usually 0 or 1 goes unseen."""
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
        found = F.normalize(vit(normalised(pixels, artifact)), dim=-1)
    torch.testing.assert_close(found, encoder.features(pixels), rtol=0, atol=TOLERANCE)
    if reason:
        with pytest.raises(ArtifactError, match=f"cannot be open_clip's ViT: .*{reason}"):
            convert(artifact, "open_clip", tmp_path / "open_clip")
        return
    convert(artifact, "open_clip", tmp_path / "open_clip")
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
    with torch.no_grad():
        found = clip.encode_image(normalised(pixels, artifact), normalize=True)
    joint: Any = restore_encoder(artifact)
    assert isinstance(joint, Encoder) and not no_plain_vit(joint)
    torch.testing.assert_close(found, joint.encode_pixels(pixels), rtol=0, atol=TOLERANCE)


def test_a_schedule_of_sizes_ends_at_the_last(demo: Path, tagger: Path, tmp_path: Path) -> None:
    """Positions are of the largest side, a model is evaluated at the last: timm gets its table."""
    old = open_artifact(tagger).manifest["config"]
    config = cfg.merge(old, {"data": {"resolution": [[0.0, 32], [0.5, 48], [0.9, 32]]}})
    backbone = open_artifact(tagger).load("backbone")
    backbone["pos_embed"] = torch.randn(1, 1 + 36, 32)
    artifact = rewritten(tagger, tmp_path / "artifact", config, {"backbone": backbone})
    convert(artifact, "timm", tmp_path / "timm")
    vit: Any = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert vit.pos_embed.shape == (1, 1 + 16, 32)
    pixels = pixels_of(demo)
    with torch.no_grad():
        found = F.normalize(vit(normalised(pixels, artifact)), dim=-1)
    expected = Model(artifact, "cpu", 1.0).encode_image(pixels[:, 0])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


# ONNX and safetensors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "rate"), [(1, 0.5), pytest.param(4, 0.7, marks=pytest.mark.slow)]
)
def test_onnxruntime_gives_our_features(
    demo: Path, tagger: Path, tmp_path: Path, frames: int, rate: float
) -> None:
    done = xray(
        "export", tagger, "--to", "onnx", "--out", tmp_path / "out", "--keep-rate", rate,
        "--frames", frames,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    source: Any = ("heldout", "image") if frames == 1 else ("clips", "video")
    pixels, encoder = pixels_of(demo, *source), restore_encoder(open_artifact(tagger))
    assert pixels.shape[1] == frames
    assert isinstance(encoder, VisionEncoder)
    encoder.keep_rate = rate
    given = encoder.normalize(pixels)
    given = given[:, 0] if frames == 1 else given
    names: dict[str, Any] = {"pixels": given.numpy()}
    exec(code_of(tmp_path / "out" / "README.md"), names)
    expected: Any = encoder
    for name, mine in (
        ("features", encoder.features(pixels)), ("probabilities", expected.probabilities(pixels)),
    ):  # fmt: skip
        found = torch.from_numpy(names[name])
        torch.testing.assert_close(found, mine, rtol=0, atol=TOLERANCE)
    assert (
        onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").get_inputs()[0].shape[0]
        == "batch"
    )


def test_plain_safetensors_are_whole(control: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = xray("export", control, "--to", "safetensors", "--out", out)
    assert done.exit_code == 0, done.stderr
    names: dict[str, Any] = {}
    exec(code_of(out / "README.md"), names)
    artifact = open_artifact(control)
    for name, value in artifact.load("backbone").items():
        assert torch.equal(names["vision"][name], value), name
    encoder: Any = restore_encoder(artifact)
    tokens = encoder.tokenizer(["a red circle", "a blue square on white"])
    ids = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        theirs = names["text"].eval()(**ids).last_hidden_state
        mine = encoder.text.llm(**ids).last_hidden_state
    mask = tokens["attention_mask"].bool()
    torch.testing.assert_close(theirs[mask], mine[mask])
    config = json.loads((out / "config.json").read_text())
    assert config["stage"] == "clip" and config["clip"]["text_head"] == "linear"


def test_lora_is_added_into_the_weights(demo: Path) -> None:
    tower = TextTower(TextConfig(lora_rank=4, pooling="mean"), demo / "llm").eval()
    for name, parameter in tower.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(3, 200, (2, 9))
    masks = (torch.ones_like(ids), torch.ones_like(ids))
    with torch.no_grad():
        expected = tower(ids, *masks)
        plain = TextTower(TextConfig(lora_rank=0, pooling="mean", tune="none"), demo / "llm").eval()
        merged = merge_lora(tower.llm).state_dict()
        assert merged.keys() == plain.llm.state_dict().keys()
        assert not torch.allclose(plain(ids, *masks), expected, atol=1e-2)
        plain.llm.load_state_dict(merged)
        torch.testing.assert_close(plain(ids, *masks), expected)


# cards and what is refused ----------------------------------------------------------------------


def test_every_artifact_has_a_card_that_people_may_edit(
    control: Path, tagger: Path, media: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(media)
    manifest = open_artifact(control).manifest
    card = (control / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: xray\n")
    assert (
        f"| clip | 120 | {manifest['data_digest'][:12]} | {manifest['config_hash'][:12]} |" in card
    )
    assert (
        f"| {manifest['sources']['photos'][:12]} |" in card and "| clip | photos | image |" in card
    )
    assert f"| loss | {manifest['metrics']['loss']:.4g} |" in card and "samples/s" not in card
    unstated = (tagger / "README.md").read_text()
    assert "license: unknown" in unstated and "nobody has stated it" in unstated
    names: dict[str, Any] = {}
    exec(code_of(control / "README.md"), names)
    assert names["likeness"].shape == (1, 2) and names["clips"].shape == (1, 16)
    copy = tmp_path / "copy"
    shutil.copytree(control, copy)
    (copy / "README.md").write_text(card.replace("apache-2.0", "mit"))
    assert open_artifact(copy).digest == open_artifact(control).digest
    assert xray("lineage", copy, "--verify").exit_code == 0


def test_the_card_of_an_export_tells_the_difference(control: Path, both: Path) -> None:
    card = (both / "README.md").read_text()
    rows = dict(re.findall(r"\| (image features|text features) \| (\S+) \|", card))
    assert {*rows} == {"image features", "text features"}
    assert all(0 <= float(value) <= 1e-5 for value in rows.values())
    assert "library_name: open_clip" in card and "apache-2.0" in card
    assert open_artifact(control).digest[:12] in card


def test_too_large_a_difference_is_refused(
    tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converting, "TOLERANCE", -1.0)
    done = xray("export", tagger, "--to", "timm", "--out", tmp_path / "out")
    refused(done, "nothing was written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reduction", ["tome", "random"])
def test_onnx_has_no_graph_for_other_reductions(
    tagger: Path, tmp_path: Path, reduction: str
) -> None:
    config = open_artifact(tagger).manifest["config"]
    config |= {"model": config["model"] | {"reduce": reduction}}
    changed = rewritten(tagger, tmp_path / "other", config, {})
    done = xray("export", changed.path, "--to", "onnx", "--out", tmp_path / "o", "--keep-rate", 0.6)
    refused(done, f"no graph for model.reduce={reduction}")


MISTAKES: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "it is one of timm, open_clip": lambda a, out: (a, "--to", "pickle"),
    "--to open_clip is for stage clip": lambda a, out: (a, "--to", "open_clip", "--out", out),
    "are for --to onnx": lambda a, out: (a, "--to", "timm", "--keep-rate", 0.5),
    "--keep-rate and --frames are for": lambda a, out: (a.parent, "--keep-rate", 0.5),
    "is there already": lambda a, out: (a, "--to", "timm", "--out", a),
    "is a checkpoint: make an artifact": lambda a, out: (f"{a.parent}@2", "--to", "timm"),
    "--weights is for RUN": lambda a, out: (a, "--to", "timm", "--weights", "ema"),
    "text.llm=, where the LLM lies": lambda a, out: (a, "data.root=x", "--to", "timm"),
    "is not an artifact": lambda a, out: (a.parent.parent, "--to", "timm"),
    "holds no run": lambda a, out: (a,),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(tagger: Path, tmp_path: Path, words: str) -> None:
    refused(xray("export", *MISTAKES[words](tagger, tmp_path / "out")), words)
    assert not (tmp_path / "out").exists()
