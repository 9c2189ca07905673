"""Model cards of artifacts and exports, and exports that are refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_checks import assert_refused, code_of
from in_process import invoke

from xray.artifacts.artifact import open_artifact
from xray.artifacts.lineage import Link
from xray.artifacts.model_card import base_models
from xray.exports import convert as converting


def test_each_artifact_has_a_card_that_users_may_edit(
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
    assert invoke("lineage", copy, "--verify").exit_code == 0


def test_the_card_of_an_export_states_the_largest_difference(
    control: Path, open_clip_export: Path
) -> None:
    card = (open_clip_export / "README.md").read_text()
    rows = dict(re.findall(r"\| (image features|text features) \| (\S+) \|", card))
    assert {*rows} == {"image features", "text features"}
    assert all(0 <= float(value) <= 1e-5 for value in rows.values())
    assert "library_name: open_clip" in card and "apache-2.0" in card
    assert open_artifact(control).digest[:12] in card


def test_a_card_names_the_models_of_the_hub_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--acme--llm"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1")
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "snapshots" / "1" / "config.json").write_text("{}")
    manifests: list[dict[str, Any]] = [
        {"config": {"model": {"name": "vit_base_patch16_224.mae", "pretrained": "timm"}}},
        {"config": {"model": {"name": "vit_base_patch16_224", "pretrained": "hf-hub:acme/vit@v1"}}},
        {"config": {"model": {"name": "a.b", "pretrained": "/data/model.safetensors"}}},
        {"config": {"text": {"llm": "acme/llm"}}},
        {"config": {"text": {"llm": "models/folder"}}},
        *({"config": {"text": {"llm": path}}} for path in ("/data/llm", "./llm", "models/my--llm")),
        {"config": {}, "imported": {"source": "hf-hub:acme/clip"}},
        {"config": {}, "imported": {"source": "hf://acme/siglip"}},
        {"config": {}, "parents": {"vision": {"path": "hf://acme/parent@main"}}},
    ]
    chain = [Link(0, "", "", "", "", "found", {"parents": {}} | own) for own in manifests]
    images = ["timm/vit_base_patch16_224.mae", "acme/vit", "acme/clip", "acme/siglip"]
    images += ["acme/parent"]
    assert base_models(chain, texts=False) == images
    assert base_models(chain) == [*images, "acme/llm"]


def test_an_export_with_too_large_a_difference_is_refused(
    tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converting, "TOLERANCE", -1.0)
    done = invoke("export", tagger, "--to", "timm", "--out", tmp_path / "out")
    assert_refused(done, "nothing was written")
    assert not list(tmp_path.iterdir())


MISTAKES: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "it is one of timm, open_clip": lambda a, out: (a, "--to", "pickle"),
    "--to open_clip is for stage clip": lambda a, out: (a, "--to", "open_clip", "--out", out),
    "are for --to onnx": lambda a, out: (a, "--to", "timm", "--keep-rate", 0.5),
    "--keep-rate and --frames are for": lambda a, out: (a.parent, "--keep-rate", 0.5),
    "already exists": lambda a, out: (a, "--to", "timm", "--out", a),
    "is a checkpoint: export an artifact first": lambda a, out: (f"{a.parent}@2", "--to", "timm"),
    "--weights is for RUN": lambda a, out: (a, "--to", "timm", "--weights", "ema"),
    "text.llm=, the folder of the LLM now": lambda a, out: (a, "data.root=x", "--to", "timm"),
    "is not an artifact": lambda a, out: (a.parent.parent, "--to", "timm"),
    "contains no run": lambda a, out: (a,),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_gives_an_error_of_one_line(tagger: Path, tmp_path: Path, words: str) -> None:
    assert_refused(invoke("export", *MISTAKES[words](tagger, tmp_path / "out")), words)
    assert not (tmp_path / "out").exists()
