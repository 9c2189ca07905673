"""`xray import`, and the commands that take its artifact."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from in_process import invoke
from released import Released, of_timm
from safetensors.torch import load_file


def test_every_command_takes_an_import(
    few: Path, released: Released, imported: Path, media: Path, tmp_path: Path
) -> None:
    source = released.folder
    results = tmp_path / "results.json"
    done = invoke("eval", imported, f"eval.retrieval.shards={few}/heldout", "--out", results)
    assert done.exit_code == 0, done.output
    assert "text_to_image_R@1" in json.loads(results.read_text())["retrieval"]
    table = tmp_path / "photos.parquet"
    done = invoke("embed", imported, media, "--out", table)
    assert done.exit_code == 0, done.output
    done = invoke("search", table, "a dog on a beach")
    assert done.exit_code == 0 and "photo.jpg" in done.stdout, done.output
    done = invoke("show", imported, media / "photo.jpg", "--out", tmp_path / "show.png",
                  "--keep-rate", "0.5")  # fmt: skip
    assert done.exit_code == 0, done.output
    done = invoke("lineage", imported, "--verify")
    assert done.exit_code == 0 and f"imported from {source}, a model of open_clip" in done.stdout
    (facts,) = json.loads(invoke("lineage", imported, "--json").stdout)
    assert facts["imported"]["source"] == str(source)
    assert "| clip, imported |" in (imported / "README.md").read_text()


def test_import_then_export_is_the_source(
    released: Released, imported: Path, tmp_path: Path
) -> None:
    done = invoke("export", imported, "--to", "open_clip", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    exported = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    own, theirs = exported.state_dict(), released.model.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_a_backbone_exports(tmp_path: Path) -> None:
    released = of_timm(tmp_path / "released")
    done = invoke("import", released.folder, "--out", tmp_path / "artifact")
    assert done.exit_code == 0 and "licence: apache-2.0" in done.stdout, done.output
    done = invoke("export", tmp_path / "artifact", "--to", "timm", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    own, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "released"))
    kept = {name: value for name, value in theirs.items() if not name.startswith("head.")}
    assert own.keys() == kept.keys() and all(torch.equal(own[name], kept[name]) for name in own)


def test_hub_names_need_a_network_or_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("hf-hub:org/model", "org/model", "open_clip:ViT-B-16:openai"):
        done = invoke("import", name, "--out", tmp_path / "artifact")
        assert done.exit_code == 2 and done.stderr.strip().count("\n") == 0, done.stderr
        assert "not in the cache" in done.stderr and "hf download" in done.stderr
    assert not any(tmp_path.iterdir())
