"""Capabilities of artifacts: what a manifest says, and what an old one leaves out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import xray
from stages import STAGES, stage_class
from xray.artifacts.artifact import open_artifact, parse_manifest
from xray.artifacts.encoders import Encoder, Tagger, restore_encoder
from xray.artifacts.lineage import lineage
from xray.artifacts.manifest_config import joint_head
from xray.artifacts.model_card import card
from xray.artifacts.offers import OFFERS_OF_STAGE
from xray.errors import ArtifactError

WRITTEN = ("offers", "heads", "summary")


def without_offers(artifact: Path, out: Path) -> Path:
    """A copy of an artifact as older versions wrote it."""
    shutil.copytree(artifact, out)
    manifest = json.loads((out / "manifest.json").read_text())
    for key in WRITTEN:
        del manifest[key]
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_an_old_manifest_offers_what_its_stage_does() -> None:
    assert {name: stage_class(name).offers for name in STAGES} == {
        name: frozenset(offers) for name, offers in OFFERS_OF_STAGE.items()
    }


def test_an_artifact_without_offers_opens_as_before(
    control: Path, tagger: Path, media: Path, tmp_path: Path
) -> None:
    clip = without_offers(control, tmp_path / "clip")
    assert isinstance(restore_encoder(open_artifact(clip)), Encoder)
    old, new = (xray.load(path, device="cpu") for path in (clip, control))
    picture = media / "photo.jpg"
    assert old.encode_image(picture).equal(new.encode_image(picture))
    tags = without_offers(tagger, tmp_path / "tags")
    assert isinstance(restore_encoder(open_artifact(tags)), Tagger)


@pytest.mark.parametrize("key, value", [("offers", "vision"), ("offers", [1]), ("heads", ["a"])])
def test_a_manifest_with_damaged_offers_is_refused(control: Path, key: str, value: Any) -> None:
    manifest = json.loads((control / "manifest.json").read_text())
    content = json.dumps({**manifest, key: value}).encode()
    with pytest.raises(ArtifactError, match="its offers, heads, summary or mixture"):
        parse_manifest(content, "manifest.json")


def test_an_old_config_has_the_old_defaults(control: Path) -> None:
    artifact = open_artifact(control)
    clip = artifact.manifest["config"]["clip"]
    for key in ("text_head", "matryoshka"):
        del clip[key]
    head = joint_head(artifact)
    assert (head.embed_dim, head.text_head, head.matryoshka) == (16, "adapter", [])
    del clip["embed_dim"]
    with pytest.raises(ArtifactError, match=f"{control} is incomplete"):
        joint_head(artifact)


def test_a_stage_describes_its_head_and_its_artifact(control: Path) -> None:
    artifact = open_artifact(control)
    config = artifact.manifest["config"]
    config["pair"] = config.pop("clip")
    artifact.manifest["heads"] = {"joint": "pair"}
    assert joint_head(artifact).embed_dim == 16
    del config["pair"]
    with pytest.raises(ArtifactError, match=rf"{control} has no section config\.pair"):
        joint_head(artifact)
    link = lineage(control)[0]
    assert link.manifest is not None
    assert "A vision backbone and a text tower" in card([link], "xray", "x", [], [])
    link.manifest["summary"] = "A pair of towers."
    assert "A pair of towers." in card([link], "xray", "x", [], [])


def test_an_artifact_that_offers_nothing_is_one_typed_error(control: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    shutil.copytree(control, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "offers": []}))
    with pytest.raises(ArtifactError, match="has no encoder"):
        restore_encoder(open_artifact(out))
