"""A teacher and the earlier stages' losses beside the contrastive one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALL_TOKENS, settings, train

from stages.base import Parents
from stages.clip import ClipModule, ClipStage
from stages.clip_auxiliary import AuxiliaryLosses
from stages.clip_teacher import load_teacher, resized
from stages.mae import MaeModule
from xray.errors import ArtifactError, ConfigError
from xray.training.metrics import read_metrics

PLAIN = (ALL_TOKENS, "model.drop_path=0.0", "train.samples=48", "train.save_every=0")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def taught(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A clip artifact that has learned a little, at half the size of its students."""
    out = tmp_path_factory.mktemp("teacher")
    return train("clip", demo, out, "train.samples=96", "data.resolution=16", "clip.embed_dim=8")


@pytest.fixture(scope="module")
def open_clip_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model of open_clip, in a file."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1,
        },
    }  # fmt: skip
    (folder / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-for-tests.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-for-tests").state_dict(), folder / "weights.pt")
    return f"open_clip:tiny-for-tests:{folder / 'weights.pt'}"


def test_an_artifact_teaches_as_it_encodes(demo: Path, taught: Any) -> None:
    teacher = load_teacher(str(taught.path), CPU)
    pixels = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    rows = [teacher.tokens(["a red circle", "a star"]), teacher.tokens(["a blue box", "x"])]
    image, text = teacher.features(pixels, teacher.pad(rows))
    encoder: Any = teacher
    alone = encoder.encoder.encode_pixels(resized(pixels, (16, 16)))
    words = encoder.encoder.encode_text(["a red circle", "a star", "a blue box", "x"])
    assert torch.allclose(image, alone, atol=1e-5)
    assert torch.allclose(text.flatten(0, 1), words, atol=1e-5) and text.shape == (2, 2, 8)


@torch.no_grad()
def test_a_model_of_open_clip_teaches_as_it_encodes(open_clip_model: str) -> None:
    import open_clip

    teacher = load_teacher(open_clip_model, CPU)
    pixels = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    image, text = teacher.features(pixels, teacher.pad([teacher.tokens(["a dog"])] * 2))
    _, name, weights = open_clip_model.split(":")
    model: Any = open_clip.create_model(name, pretrained=weights).eval()
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in (model.visual.image_mean, model.visual.image_std)
    )
    frames = (pixels.float() / 255 - mean) / std
    first = [
        torch.nn.functional.normalize(model.encode_image(frames[:, t]), dim=-1) for t in (0, 1)
    ]
    expected = torch.nn.functional.normalize(first[0] + first[1], dim=-1)
    assert torch.allclose(image, expected, atol=1e-5)
    words = model.encode_text(open_clip.get_tokenizer(name)(["a dog"]), normalize=True)
    assert torch.allclose(text[:, 0], words.expand(2, -1), atol=1e-5)


def test_teachers_that_cannot_teach_are_refused(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    mae = train("mae", demo, tmp_path / "mae", "train.samples=12")
    with pytest.raises(ArtifactError, match="is of stage mae: a clip artifact can teach"):
        load_teacher(str(mae.path), CPU)
    for name, message in (
        ("open_clip:ViT-B-32", "must be open_clip:MODEL:WEIGHTS"),
        ("open_clip:No-Such-Model:x.pt", "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_teacher(name, CPU)


@pytest.mark.parametrize("kind", ["artifact", "open_clip"])
def test_a_student_comes_near_its_teacher(
    demo: Path, tmp_path: Path, taught: Any, open_clip_model: str, kind: str
) -> None:
    name = str(taught.path) if kind == "artifact" else open_clip_model
    more = (f"clip.teacher={name}", "clip.captions=2", "debug.overfit_batch=true")
    made = train("clip", demo, tmp_path / "whole", *PLAIN, *more)
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    if kind == "artifact":  # cut blocks know no more of the one teacher than of the other
        train("clip", demo, tmp_path / "cut", *PLAIN, *more, "train.micro_batch=2")
        cut = read_metrics(tmp_path / "cut" / "metrics.jsonl")
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in cut] == pytest.approx([r[key] for r in whole], rel=2e-4)
    assert whole[-1]["photos/distill"] < whole[0]["photos/distill"]
    assert made.manifest["inputs"]["teacher"]
    assert not any("teacher" in t for part in made.manifest["tensors"].values() for t in part)


def test_the_losses_of_all_stages_in_one(demo: Path, tmp_path: Path) -> None:
    more = ("clip.mae_weight=0.5", "clip.hashtag_weight=0.25", "mae.decoder_dim=32",
            "mae.decoder_depth=1", "mae.decoder_heads=2", "hashtag.min_count=2")  # fmt: skip
    made = train("clip", demo, tmp_path / "whole", *PLAIN, *more)
    train("clip", demo, tmp_path / "cut", *PLAIN, *more, "train.micro_batch=2", "zero.stage=2")
    whole, cut = (read_metrics(tmp_path / x / "metrics.jsonl") for x in ("whole", "cut"))
    assert [r["loss"] for r in cut] == pytest.approx([r["loss"] for r in whole], rel=2e-4)
    assert whole[-1]["photos/hashtag_loss"] < whole[0]["photos/hashtag_loss"]
    assert whole[-1]["clips/mae_loss"] < whole[0]["clips/mae_loss"]
    assert made.manifest["inputs"]["vocabulary"]
    assert not any("auxiliary" in t for part in made.manifest["tensors"].values() for t in part)


def test_settings_that_do_nothing_here_are_refused(demo: Path, tmp_path: Path) -> None:
    for setting, message in (
        ("hashtag.truncate=0.1", r"hashtag.truncate=0.1 does nothing in the clip stage"),
        ("hashtag.teacher=x", r"hashtag.teacher=x does nothing"),
        ("mae.decoder_dim=30", r"mae.decoder_dim=30 must be a multiple"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings("clip", demo, tmp_path, "clip.hashtag_weight=1", "clip.mae_weight=1", setting)


def test_auxiliary_losses_are_those_of_their_stages(demo: Path, tmp_path: Path) -> None:
    config = settings("clip", demo, tmp_path, "clip.mae_weight=1", "mae.decoder_dim=32",
                      "mae.decoder_depth=1", "mae.decoder_heads=2")  # fmt: skip
    torch.manual_seed(0)
    stage = ClipStage(config)
    stage.prepare({}, Parents())
    module: ClipModule = stage.build(Parents())
    alone = MaeModule(settings("mae", demo, tmp_path))
    alone.vision.load_state_dict(module.vision.state_dict())
    auxiliary = module.auxiliary
    assert isinstance(auxiliary, AuxiliaryLosses) and auxiliary.decoder is not None
    alone.decoder.load_state_dict(auxiliary.decoder.state_dict())
    batch = {
        "pixels": torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8),
        "mask_noise": torch.rand(3, 16),
    }
    pixels = module.normalize(batch["pixels"])
    mine = auxiliary(module, batch, pixels, torch.zeros(3, 32), 0.0)["mae_loss"]
    theirs = alone.loss_from_features(alone.features(batch, 0.0)).loss
    assert mine.shape == (3,) and torch.allclose(mine.mean(), theirs, atol=1e-5)
