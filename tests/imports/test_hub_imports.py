"""Released weights that `xray import` downloads, from a stand-in of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_server import hub_server
from in_process import invoke

from stages import load_settings
from xray.artifacts.artifact import open_artifact
from xray.artifacts.lineage import lineage
from xray.artifacts.model_card import base_models
from xray.imports.cached import artifact_of, open_model


def test_a_name_of_the_hub_is_downloaded_or_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from transformers import CLIPImageProcessor, ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8))
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(source)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    with hub_server(monkeypatch) as hub:
        hub.add("models/acme/vit", {path.name: path.read_bytes() for path in source.iterdir()})
        hub.add("models/acme/gated", {"config.json": b"{}"}, gated=True)
        for name, words in (
            ("hf://acme/none", "acme/none does not exist on the hub, or is private: run `hf auth"),
            ("hf-hub:acme/gated", "accept the conditions on the page of acme/gated, then run"),
        ):
            done = invoke("import", name, "--out", out)
            assert done.exit_code == 2 and words in done.stderr, done.output
            assert not out.exists()
        done = invoke("import", "hf://acme/vit", "--out", out, "--license", "mit")
        assert done.exit_code == 0, done.output
        names = ("acme/vit", "hf-hub:acme/vit", "hf://acme/vit")
        opened = [open_model(name).load("backbone") for name in names]
        files = (path for path in out.rglob("*") if path.is_file())
        hub.add("models/acme/ours", {str(p.relative_to(out)): p.read_bytes() for p in files})
        assert artifact_of("hf://acme/ours") == "hf://acme/ours"
        layer = {"init_from": ["hf://acme/vit"], "train": {"samples": 8}}  # as in a yaml file
        config = load_settings("mae", layer)
        assert config.init_from == [artifact_of("acme/vit")] and config.model.kwargs["depth"] == 1
        unknown = load_settings("mae", {"init_from": ["runs/later"], "train": {"samples": 8}})
        assert unknown.init_from == ["runs/later"]  # without a request: a run may come first
        for command, name, words in (
            (["import", "--out", "other"], "acme/ours", "commands take it as hf://acme/ours"),
            (["train", "mae", "--init-from"], "acme/none", "acme/none does not exist on the hub"),
            (["train", "mae"], "init_from=[hf-hub:acme/none]", "acme/none does not exist on the"),
            (["plan", "quickstart"], "mae.init_from=[hf-hub:acme/none]", "acme/none does not"),
            (["eval"], "runs/clip", "runs/clip does not exist on the hub"),
        ):
            refused = invoke(*command, name)
            assert refused.exit_code == 2 and words in refused.stderr, refused.output
    (tmp_path / "runs").mkdir()
    assert "runs/clip is not an artifact: there is no such" in invoke("eval", "runs/clip").stderr
    stem = open_artifact(out).load("backbone")["patch_embed.proj.weight"].sum(dim=2)
    assert all(torch.equal(own["patch_embed.proj.weight"].sum(dim=2), stem) for own in opened)
    assert torch.allclose(stem, model.embeddings.patch_embeddings.projection.weight)
    assert base_models(lineage(out)) == ["acme/vit"]
