"""Features, logits and settings of imported models against their libraries' own forward."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from released import (
    MEAN,
    SIDE,
    TEXTS,
    Released,
    normalised,
    of_backbone,
    of_open_clip,
    of_sentences,
    of_timm,
    of_transformers,
)

from data_pipelines.shards.tar_index import index_shard
from xray.api import load
from xray.artifacts.encoders import Encoder, TextEncoder, VisionEncoder
from xray.imports.convert import import_model

FEATURES = {"rtol": 0, "atol": 1e-5}
LOGITS = {"rtol": 0, "atol": 1e-4}
TWO_TOWERS: dict[str, Callable[[Path], Released]] = {
    "open_clip": of_open_clip,
    "open_clip plain": partial(of_open_clip, kind="plain"),
    "open_clip MetaCLIP 2": partial(of_open_clip, kind="worldwide"),
    "open_clip SigLIP": partial(of_open_clip, kind="siglip"),
    **{
        name: partial(of_transformers, name=name)
        for name in ("CLIPModel", "MetaClip2Model", "SiglipModel", "Siglip2Model")
    },
}
BACKBONES: dict[str, Callable[[Path], Released]] = {
    "timm": of_timm,
    "timm's DINOv3": partial(of_timm, name="vit_small_patch16_dinov3"),
    **{
        name: partial(of_backbone, name=name)
        for name in (
            *("ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"),
            *("Dinov2Model gated", "DINOv3ViTModel", "DINOv3ViTModel gated"),
        )
    },
}


@pytest.fixture
def pixels() -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 1, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)


@pytest.mark.parametrize("kind", TWO_TOWERS)
@torch.no_grad()
def test_two_towers_give_the_librarys_features_and_logits(
    kind: str, pixels: torch.Tensor, tmp_path: Path
) -> None:
    released = TWO_TOWERS[kind](tmp_path / "released")
    artifact = import_model(str(released.folder), tmp_path / "artifact")
    assert artifact.stage == "clip" and artifact.offers == {"vision", "joint"}
    encoder, given = Encoder(artifact), normalised(pixels)
    assert released.text is not None and released.logits is not None
    image, text = encoder.encode_pixels(pixels), encoder.encode_text(TEXTS)
    texts = TEXTS if "SigLIP" not in kind else [TEXTS[0], "red and blue things its", *TEXTS[2:]]
    torch.testing.assert_close(image, released.image(given), **FEATURES)
    torch.testing.assert_close(text, released.text(texts), **FEATURES)
    head = artifact.load("head")
    logits = encoder.logit_scale * image @ text.t() + head.get("logit_bias", 0.0)
    torch.testing.assert_close(logits, released.logits(given, texts), **LOGITS)
    data = artifact.manifest["config"]["data"]
    squash = "iglip" in kind.lower()
    assert (data["mean"], data["resize"]) == (MEAN, "squash" if squash else "shortest")
    assert artifact.manifest["samples"] == 0 and artifact.manifest["imported"]["files"]


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_backbones_give_the_librarys_features(
    kind: str, pixels: torch.Tensor, tmp_path: Path
) -> None:
    released = BACKBONES[kind](tmp_path / "released")
    artifact = import_model(str(released.folder), tmp_path / "artifact")
    assert artifact.offers == {"vision"}
    ours = VisionEncoder(artifact).features(pixels)
    torch.testing.assert_close(ours, released.image(normalised(pixels)), **FEATURES)


@pytest.mark.parametrize("pooling", ("cls", "mean"))
@torch.no_grad()
def test_sentence_encoders_give_the_librarys_vectors(pooling: str, tmp_path: Path) -> None:
    released = of_sentences(tmp_path / "released", pooling)
    artifact = import_model(str(released.folder), tmp_path / "artifact")
    assert artifact.offers == {"sentences"} and artifact.manifest["config"]["license"] == "mit"
    assert released.text is not None
    ours = TextEncoder.after(artifact).encode_text(TEXTS)
    torch.testing.assert_close(ours, released.text(TEXTS), **FEATURES)


@torch.no_grad()
def test_a_photo_is_prepared_as_open_clip_does(tmp_path: Path) -> None:
    import open_clip

    released = of_open_clip(tmp_path / "released")
    model = load(import_model(str(released.folder), tmp_path / "artifact").path)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8, generator=draw)
    photo = Image.fromarray(noise.numpy())
    prepare: Any = open_clip.create_model_from_pretrained(f"local-dir:{released.folder}")[1]
    theirs = released.image(prepare(photo)[None])
    torch.testing.assert_close(model.encode_image(photo), theirs, **FEATURES)


@pytest.mark.parametrize("kind", ("open_clip", "open_clip SigLIP"))
@torch.no_grad()
def test_real_photos_have_the_features_of_open_clip(
    kind: str, shared_data: Path, tmp_path: Path
) -> None:
    """From the file to the feature, by open_clip's preprocessing and by that of the artifact."""
    import open_clip

    released = TWO_TOWERS[kind](tmp_path / "released")
    model = load(import_model(str(released.folder), tmp_path / "artifact").path)
    prepare: Any = open_clip.create_model_from_pretrained(f"local-dir:{released.folder}")[1]
    shard = index_shard(min((shared_data / "captions_val").glob("*.tar")))
    for member in range(4):
        photo = Image.open(io.BytesIO(shard.read(member, ("jpg",))["jpg"])).convert("RGB")
        theirs = released.image(prepare(photo)[None])
        torch.testing.assert_close(model.encode_image(photo), theirs, **FEATURES)
