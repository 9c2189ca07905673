"""Folders that cannot be imported: one line says why, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import invoke
from released import of_backbone, of_open_clip, of_transformers, tokenizer
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return of_transformers(tmp_path_factory.mktemp("clip") / "released", "CLIPModel").folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return of_open_clip(tmp_path_factory.mktemp("other") / "released", "worldwide").folder


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(folder: Path, *names: str, file: str = "model.safetensors") -> None:
    state = load_file(folder / file)
    for name in names:
        del state[name]
    save_file(state, folder / file)


def tensor_missing(folder: Path) -> None:
    without(folder, "vision_model.encoder.layers.1.mlp.fc1.weight")


def text_missing(folder: Path) -> None:
    without(folder, "text_model.encoder.layers.1.mlp.fc1.weight")


def query_missing(folder: Path) -> None:
    without(folder, "vision_model.encoder.layers.0.self_attn.q_proj.weight")


def queries_missing(folder: Path) -> None:
    """Two of the three biases that are one in the backbone."""
    without(folder, *(f"vision_model.encoder.layers.0.self_attn.{p}_proj.bias" for p in "kv"))


def head_missing(folder: Path) -> None:
    without(folder, "visual_projection.weight")


def unknown_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"vision_model.extra.weight": torch.zeros(2)}, folder / "model.safetensors")


def part_missing(folder: Path) -> None:
    index = {"weight_map": {"logit_scale": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def outside(folder: Path) -> None:
    index = {"weight_map": {"logit_scale": "../model.safetensors"}}
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"none")


def other_tokenizer(folder: Path) -> None:
    tokenizer(end=2).save_pretrained(folder)


def larger_tokenizer(folder: Path) -> None:
    tokenizer(end=299, vocabulary=900).save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def padding(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    content = {**json.loads(path.read_text()), "size": {"shortest_edge": 24}}
    path.write_text(json.dumps(content))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def activation(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder, vision_config={**config["vision_config"], "hidden_act": "relu"})


def own_code(folder: Path) -> None:
    edit(folder, model_type="mine", auto_map={"AutoModel": "code.Model"})


CASES: list[tuple[Callable[[Path], None], str]] = [
    (pickled, "pytorch_model.bin is a pickle"),
    (tensor_missing, ": vision_model.encoder.layers.1.mlp.fc1.weight is missing"),
    (text_missing, ": text_model.encoder.layers.1.mlp.fc1.weight is missing"),
    (query_missing, ": vision_model.encoder.layers.0.self_attn.q_proj.weight is missing"),
    (queries_missing, "self_attn.k_proj.bias is missing (and 1 more)"),
    (head_missing, ": visual_projection.weight is missing"),
    (unknown_tensor, "no place for: vision_model.extra.weight"),
    (part_missing, "lacks model-00001-of-00002.safetensors"),
    (outside, "lacks ../model.safetensors"),
    (damaged, "not a readable safetensors file"),
    (other_tokenizer, "another model's tokenizer"),
    (larger_tokenizer, "embeds 300"),
    (no_tokenizer, "no tokenizer"),
    (no_processor, "no preprocessor_config.json"),
    (padding, "crop_size=32 is above size=24"),
    (activation, "activation relu"),
    (own_code, "cannot be imported (model_type mine)"),
]


@pytest.mark.parametrize("spoil, reason", CASES, ids=[spoil.__name__ for spoil, _ in CASES])
def test_spoiled_folder(
    spoil: Callable[[Path], None], reason: str, clip: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "released"
    shutil.copytree(clip, folder)
    spoil(folder)
    before = {path.name for path in tmp_path.iterdir()}
    refused(folder, tmp_path / "artifact", reason)
    assert {path.name for path in tmp_path.iterdir()} == before


def refused(folder: Path, out: Path, reason: str) -> None:
    """Require one line that gives the reason, and no artifact."""
    done = invoke("import", folder, "--out", out)
    assert done.exit_code == 2, done.output
    assert reason in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
    assert not out.exists() and not out.with_name(f"{out.name}.tmp").exists()


LINKS = {  # name of a file or a folder -> what it links to
    "model.safetensors": "../kept/model.safetensors",
    "config.json": "../kept/config.json",
    "tokenizer.json": "../kept/tokenizer.json",
    "README.md": "../kept/key",
    "1_Pooling": "../kept",
}


@pytest.mark.parametrize("name", LINKS)
def test_links_to_files_outside_are_refused(name: str, clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "released"
    for copy in (folder, tmp_path / "kept"):
        shutil.copytree(clip, copy)
    (tmp_path / "kept" / "key").write_text("license: secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(LINKS[name])
    refused(folder, tmp_path / "artifact", f"{name} is a link that leads outside of the folder")


def test_only_the_files_of_a_tokenizer_are_copied(clip: Path, tmp_path: Path) -> None:
    """Links of the hub's cache, into the blobs of the same repository, are followed."""
    folder, blobs = tmp_path / "models--acme--clip" / "snapshots" / "1", "models--acme--clip/blobs"
    shutil.copytree(clip, folder)
    (tmp_path / blobs).mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    for name in ("tokenizer_extra.json", "tokenizer.py", "vocab.pkl", "other.model"):
        (folder / name).write_text("{}")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "tokenizer").mkdir()
    (folder / "vocab.json").mkdir()
    done = invoke("import", folder, "--out", tmp_path / "artifact")
    assert done.exit_code == 0, done.output
    copied = {path.name for path in (tmp_path / "artifact" / "llm").iterdir()}
    assert copied == {"config.json", "tokenizer.json", "tokenizer_config.json"}


TOWERS = [
    ({"vision_cfg": {"layers": [1, 1, 1, 1]}}, "is a ResNet"),
    (
        {"vision_cfg": {"timm_model_name": "convnext_base", "timm_pool": "", "layers": 2}},
        "ConvNeXt",
    ),
    ({"vision_cfg": {"attentional_pool": True}}, "attentional_pool"),
    ({"vision_cfg": {"pool_type": "avg"}}, "pool_type=avg"),
    ({"text_cfg": {"hf_model_name": "xlm-roberta-base"}}, "hf_model_name=xlm-roberta-base"),
    ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask=True"),
    ({"text_cfg": {"tokenizer_kwargs": {"strip_sep_token": True}}}, "strip_sep_token"),
    ({"multimodal_cfg": {}}, "CoCa"),
]


@pytest.mark.parametrize("change, reason", TOWERS, ids=[reason for _, reason in TOWERS])
def test_other_towers_of_open_clip(
    change: dict[str, dict[str, object]], reason: str, other: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "released"
    shutil.copytree(other, folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    for key, values in change.items():
        config["model_cfg"][key] = {**config["model_cfg"].get(key, {}), **values}
    path.write_text(json.dumps(config))
    refused(folder, tmp_path / "artifact", reason)


@pytest.mark.parametrize(
    "name", ["visual.ln_post.bias", "transformer.resblocks.1.ln_2.weight", "text_projection"]
)
def test_a_missing_tensor_has_the_name_of_open_clip(name: str, other: Path, tmp_path: Path) -> None:
    folder = tmp_path / "released"
    shutil.copytree(other, folder)
    without(folder, name, file="open_clip_model.safetensors")
    refused(folder, tmp_path / "artifact", f": {name} is missing")


def test_backbones_of_other_blocks(tmp_path: Path) -> None:
    folder = of_backbone(tmp_path / "released", "Dinov2Model").folder
    edit(folder, use_swiglu_ffn=True)
    refused(folder, tmp_path / "artifact", "encoder.layer.0.mlp.fc1.weight has the shape")
    edit(folder, model_type="convnextv2", use_swiglu_ffn=False)
    refused(folder, tmp_path / "artifact", "model_type convnextv2")


def test_names_that_are_none(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    refused(tmp_path / "nothing", out, "is not a folder")
    refused(clip / "model.safetensors", out, "give the folder with its config.json")
    for name, reason in (
        ("open_clip:ViT-B-17:openai", "no model 'ViT-B-17'; did you mean"),
        ("open_clip:ViT-B-16:mine", "no weights 'mine'"),
    ):
        done = invoke("import", name, "--out", out)
        assert done.exit_code == 2 and reason in done.stderr, done.stderr
    (tmp_path / "manifest.json").write_text("{}")
    refused(tmp_path, tmp_path / "other", "is an artifact already")
    done = invoke("import", clip, "--out", clip)
    assert done.exit_code == 2 and "already exists" in done.stderr
