"""The clip stage continues an imported artifact: its first loss, its settings, its heads."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from in_process import invoke
from open_clip.loss import SigLipLoss
from PIL import Image
from released import MEAN, SIDE, Released, normalised, of_backbone

from data_pipelines.shards.source import Source, open_source
from stages import load_settings
from xray.api import load
from xray.artifacts.artifact import open_artifact
from xray.artifacts.location import Place
from xray.errors import ArtifactError
from xray.evaluation.feature_extraction import read_all_captions
from xray.models.backbone import VisionBackbone
from xray.models.weight_loading import load_adapted
from xray.training.metrics import read_metrics

PHOTOS = 8


def train(few: Path, out: Path, *more: object) -> None:
    done = invoke(
        "train", "clip", f"data.root={few}", "--out", out,
        "data.sources={photos: {shards: photos, modality: image}}",
        f"data.blocks=[{{source: photos, samples: {PHOTOS}}}]", "data.workers=0",
        "train.log_every=1", "train.save_every=0", "train.precision=fp32",
        "debug.overfit_batch=true",
        "optim={name: adamw, base_lr: 0.01, warmup: 0.0}", *more,
    )  # fmt: skip
    assert done.exit_code == 0, done.output


def test_training_begins_at_the_loss_of_open_clip(
    few: Path, released: Released, imported: Path, tmp_path: Path
) -> None:
    """The block has all photos, so that the order in which they are drawn does not matter."""
    same = tmp_path / "run", f"train.samples={20 * PHOTOS}", "text.tune=full"
    train(few, *same, "--init-from", imported)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    source = open_source("photos", "photos", "image", str(few))
    captions = [texts[0] for texts in read_all_captions(source)]
    model = load(imported)
    pictures = [open_photo(source, place) for place in source.places()]
    pixels = torch.stack([model.preprocess(picture) for picture in pictures])[:, None]
    assert released.text is not None
    with torch.no_grad():
        image, text = released.image(normalised(pixels)), released.text(captions)
        scale, bias = released.model.logit_scale.exp(), released.model.logit_bias
        if bias is None:
            expected = open_clip.ClipLoss()(image, text, scale)
        else:
            expected = SigLipLoss()(image, text, scale, bias)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]
    train(few, *same, "--init-from", imported)  # the run knows itself again
    trained = open_artifact(tmp_path / "run")
    config = trained.manifest["config"]
    assert config["clip"]["heads"] == "parent" and config["data"]["mean"] == MEAN
    assert trained.manifest["parents"]["vision"]["manifest"] == open_artifact(imported).digest
    before, after = open_artifact(imported).load("text"), trained.load("text")
    assert before.keys() == after.keys() and any(
        not torch.equal(before[k], after[k]) for k in after
    )


def test_lora_of_an_imported_text_tower_is_refused(
    few: Path, imported: Path, tmp_path: Path
) -> None:
    for setting, words in (
        ("text.tune=lora", "whose text tower has no LoRA weights: set text.tune=none or full"),
        ("optim.text.tune=lora", "unknown key 'optim.text.tune'; did you mean 'text.tune'?"),
    ):
        done = invoke(
            "train", "clip", "--init-from", imported, f"data.root={few}", "--out", tmp_path / "run",
            "data.sources={photos: {shards: photos}}", "train.samples=8", setting,
            f"data.blocks=[{{source: photos, samples: {PHOTOS}}}]",
        )  # fmt: skip
        assert done.exit_code == 2 and words in done.stderr, done.output
        assert done.stderr.strip().count("\n") == 0 and not (tmp_path / "run").exists()


def open_photo(source: Source, place: tuple[int, int]) -> Image.Image:
    """Open a photo of a source as PIL does."""
    return Image.open(io.BytesIO(source.read(*place, ("jpg",))["jpg"]))


def test_settings_of_the_user_replace_those_of_the_parent(few: Path, imported: Path) -> None:
    blocks = {"sources": {"photos": {"shards": "photos"}}, "blocks": []}
    layer = {"data": blocks, "model": {"keep_rate": 0.5}, "train": {"samples": 8}}
    config = load_settings("clip", layer, init_from=[str(imported)])
    theirs = open_artifact(imported).manifest["config"]
    assert config.model.keep_rate == 0.5 and config.model.name == theirs["model"]["name"]
    assert config.data.resolution == SIDE
    # with an LLM of its own, a run takes the backbone only
    other: Any = load_settings("clip", layer, {"text": {"llm": "llm"}}, init_from=[str(imported)])
    assert other.clip.heads == "new" and other.clip.text_head == "adapter"
    assert other.model.name == theirs["model"]["name"]


def test_heads_of_another_shape_are_refused(few: Path, imported: Path, tmp_path: Path) -> None:
    done = invoke(
        "train", "clip", f"data.root={few}", "--out", tmp_path / "run", "--init-from", imported,
        "data.sources={photos: {shards: photos, modality: image}}", "data.workers=0",
        f"data.blocks=[{{source: photos, samples: {PHOTOS}}}]", "train.samples=8",
        "clip.text_head=adapter",
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]  # after a warning of captions that are cut
    assert done.exit_code == 2 and "clip.heads=parent: text_adapter" in last
    assert "set clip.heads=new" in last


def test_a_recipe_with_stored_texts_continues_an_import(
    few: Path, imported: Path, tmp_path: Path
) -> None:
    recipe = {
        "stages": ["clip"],
        "out": str(tmp_path / "run"),
        "data": {
            "root": str(shutil.copytree(few, tmp_path / "data")),
            "workers": 0,
            "sources": {"photos": {"shards": "photos"}},
            "blocks": [{"source": "photos", "samples": PHOTOS}],
        },
        "train": {"samples": PHOTOS, "save_every": 0},
        "clip": {"init_from": [str(imported)], "text": {"features": "fp32", "tune": "none"}},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe), "utf-8")
    done = invoke("run", tmp_path / "mine.yaml")
    assert done.exit_code == 0, done.stderr
    trained = open_artifact(tmp_path / "run" / "clip").manifest
    assert trained["parents"]["vision"]["manifest"] == open_artifact(imported).digest


def test_any_stage_takes_the_backbone_of_an_import(tmp_path: Path) -> None:
    released = of_backbone(tmp_path / "released", "Dinov2WithRegistersModel")
    done = invoke("import", released.folder, "--out", tmp_path / "artifact")
    assert done.exit_code == 0, done.output
    layer = {"data": {"sources": {"photos": {"shards": "photos"}}}, "train": {"samples": 8}}
    config = load_settings("hashtag", layer, init_from=[str(tmp_path / "artifact")])
    assert config.model.kwargs["reg_tokens"] == 4
    backbone = VisionBackbone(config.model, config.data.resolution)
    load_adapted(backbone, open_artifact(tmp_path / "artifact").load("backbone"), "the import")


DAMAGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no data": ("config", {"data": None}, "is damaged: it has no config.data"),
    "no model": ("config", {"model": None}, "is damaged: it has no config.model"),
    "no text": ("config", {"text": 3}, "is damaged: its config.text is no section"),
    "no resolution": ("config", {"data": {}}, "config.data.resolution=None must be a whole"),
    "no files": ("files", {"../out": ""}, "names a file outside"),
    "no limit": ("config", {"model": {"kwargs": {"depth": 10**9}}}, "depth=1000000000 must be"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_parent_is_one_line(imported: Path, tmp_path: Path, damage: str) -> None:
    section, change, words = DAMAGES[damage]
    manifest = json.loads((imported / "manifest.json").read_text())
    manifest[section] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError) as raised:
        load_settings("clip", {"train": {"samples": 8}}, init_from=[str(tmp_path)])
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_manifest_that_cannot_be_read_is_not_passed_over(
    imported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began without its parent's settings would train another model."""

    def fail(place: Place, name: str) -> bytes:
        raise OSError("Input/output error")

    monkeypatch.setattr(Place, "read", fail)
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read: Input/output error"):
        load_settings("clip", {"train": {"samples": 8}}, init_from=[str(imported)])


def test_a_plan_counts_the_text_tower_of_the_parent(imported: Path, tmp_path: Path) -> None:
    """The plan has as many parameters as the parent stores."""
    values = [
        "data.sources={photos: {shards: photos, modality: image}}", f"data.root={tmp_path}",
        f"data.blocks=[{{source: photos, samples: {PHOTOS}}}]", "train.samples=8",
        f"init_from=[{imported}]", "text.tune=none",
    ]  # fmt: skip
    done = invoke("plan", "clip", *values, "--json")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert not [note for note in plan["notes"] if "LLM" in note]
    tensors = open_artifact(imported).manifest["tensors"]
    parts = [tensors[part].values() for part in ("backbone", "head", "text")]
    stored = sum(math.prod(tensor["shape"]) for part in parts for tensor in part)
    row = plan["stages"][0]
    assert row["parameters"] == stored and row["memory"]["llm"] > 0
