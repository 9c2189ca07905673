"""Distillation in the clip stage, from an artifact or from a model of open_clip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import QUICK, train

from stages.clip_teacher import FromArtifact, load_teacher, resized
from xray.errors import ArtifactError, ConfigError
from xray.training.metrics import read_metrics

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(trained: Callable[..., Path]) -> Path:
    """A clip artifact with half the resolution and feature width of its students."""
    return trained("clip", "train.samples=96", "data.resolution=16", "clip.embed_dim=8")


@pytest.fixture(scope="module")
def open_clip_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a tiny open_clip model with random weights in a file."""
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


def test_an_artifact_as_teacher_gives_its_encoders_features(teacher: Path) -> None:
    loaded: Any = load_teacher(str(teacher), CPU)
    pixels = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    rows = [loaded.tokens(["a red circle", "a star"]), loaded.tokens(["a blue box", "x"])]
    image, text = loaded.features(pixels, loaded.pad(rows))
    alone = loaded.encoder.encode_pixels(resized(pixels, (16, 16)))
    words = loaded.encoder.encode_text(["a red circle", "a star", "a blue box", "x"])
    assert torch.allclose(image, alone, atol=1e-5)
    assert torch.allclose(text.flatten(0, 1), words, atol=1e-5) and text.shape == (2, 2, 8)


@torch.no_grad()
def test_an_open_clip_teacher_gives_its_models_features(open_clip_model: str) -> None:
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


def test_unusable_teachers_are_refused(trained: Callable[..., Path]) -> None:
    pytest.importorskip("open_clip")
    mae = trained("mae", "train.samples=24")
    with pytest.raises(ArtifactError, match="is of stage mae: a clip artifact can teach"):
        load_teacher(str(mae), CPU)
    for name, message in (
        ("open_clip:ViT-B-32", "must be open_clip:MODEL:WEIGHTS"),
        ("open_clip:No-Such-Model:x.pt", "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_teacher(name, CPU)


@pytest.mark.parametrize("kind", ["artifact", "open_clip"])
def test_a_student_approaches_its_teacher(
    demo: Path,
    tmp_path: Path,
    teacher: Path,
    open_clip_model: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = str(teacher) if kind == "artifact" else open_clip_model
    more = (f"clip.teacher={name}", "clip.captions=2", "debug.overfit_batch=true")
    made = train("clip", demo, tmp_path / "whole", *QUICK, *more)
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    if kind == "artifact":  # one kind suffices: splitting does not depend on it
        calls, features = [], FromArtifact.features

        def spy(*args: Any) -> Any:
            calls.append(1)
            return features(*args)

        monkeypatch.setattr(FromArtifact, "features", spy)
        train("clip", demo, tmp_path / "split", *QUICK, *more, "train.micro_batch=2")
        assert len(calls) == 4 * 6  # once per micro-batch, though the student runs twice
        split = read_metrics(tmp_path / "split" / "metrics.jsonl")
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in split] == pytest.approx([r[key] for r in whole], rel=2e-4)
    assert whole[-1]["photos/distill"] < whole[0]["photos/distill"]
    assert made.manifest["inputs"]["teacher"]
    assert not any("teacher" in t for part in made.manifest["tensors"].values() for t in part)
