"""Every shipped recipe trains from end to end, shrunk to seconds, and is evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xray.artifacts.artifact import open_artifact
from xray.config import ModelConfig
from xray.config import loading as cfg
from xray.models.backbone import VisionBackbone
from xray.recipes.recipe import Recipe, load_recipe
from xray.recipes.run import evaluate, run_recipe

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
DEMO = {"image": "photos", "video": "clips"}  # the demo data by modality
# Sizes that recipes of large models set for themselves, by stage
SIZES = {
    "mae": ("mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=2"),
    "hashtag": ("hashtag.min_count=2",),
    "text": ("text.max_length=32",),
    "clip": ("clip.embed_dim=16", "clip.text.max_length=32"),
}
COMMON = (
    *("model.name=vit_tiny_patch16_224", f"model.kwargs={json.dumps(TINY)}"),
    *("data.resolution=32", "data.frames=4", "data.workers=0", "data.lanes=4"),
    *("train.precision=fp32", "train.micro_batch=0", "train.device=cpu", "train.compile=false"),
)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of timm weights for recipes that start from a pretrained tower."""
    torch.manual_seed(0)
    config = ModelConfig(kwargs=TINY, tubelet=1)
    path = tmp_path_factory.mktemp("tower") / "vit.safetensors"
    state = VisionBackbone(config, 32, 1).state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].squeeze(2)
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def shrunk(recipe: Recipe, demo: Path) -> list[str]:
    """Settings that train a recipe's stages for two steps on the demo data, with a tiny model."""
    settings = list(COMMON)
    for run in recipe.runs:
        sources = run.data.sources
        blocks = [{"source": block.source, "samples": 4} for block in run.data.blocks]
        settings.append(f"{run.stage}.data.blocks={json.dumps(blocks)}")
        settings.append(f"{run.stage}.train.samples={2 * 4 * len(run.blocks)}")
        settings += SIZES[run.stage]
        settings += [f"data.sources.{n}.shards={DEMO[s.modality]}" for n, s in sources.items()]
    if recipe.prepare.demo is not None:  # as the fixture has made them
        sizes = {"photos": 96, "clips": 24, "heldout": 24, "per_shard": 32, "side": 32, "frames": 8}
        settings.append(f"prepare.demo={json.dumps(sizes)}")
    if recipe.prepare.llm is not None:
        sizes = {"captions": "photos", "vocab_size": 300, "width": 32, "depth": 2, "heads": 4}
        settings.append(f"prepare.llm={json.dumps(sizes)}")
    asked: dict[str, Any] = {"classes": "classes.txt", "train": "gallery"}
    for key, _ in recipe.eval.data_sets(recipe.eval.configured()):
        clips = "clips" in key or "video" in key
        settings.append(
            f"eval.{key}={asked.get(key.split('.')[-1], 'clips' if clips else 'heldout')}"
        )
    if "zero_shot" in recipe.eval.configured():
        settings.append("eval.zero_shot.classes=classes.txt")
    return settings


@pytest.mark.parametrize("name", cfg.shipped("recipe"))
def test_a_shipped_recipe_trains_from_end_to_end(
    name: str, demo: Path, tower: Path, tmp_path: Path
) -> None:
    given = [f"data.root={demo}", f"out={tmp_path}", f"text.llm={demo / 'llm'}"]
    if name == "adapt":
        given.append(f"model.pretrained={tower}")
    full = load_recipe(name, given)
    recipe = load_recipe(name, [*given, *shrunk(full, demo)])
    artifacts = run_recipe(recipe)
    assert [artifact.stage for artifact in artifacts] == [run.stage for run in full.runs]
    for artifact in artifacts:
        assert artifact.manifest["step"] == 2
        loss = artifact.manifest["metrics"]["loss"]
        assert loss == loss and 0 < loss < 1e3
    parents = artifacts[-1].manifest["parents"]
    assert len(parents) == len(recipe.runs[-1].init_from)
    asked = recipe.eval.in_recipe({a.stage: open_artifact(a.path).offers for a in artifacts})
    table = evaluate(recipe, artifacts)
    assert (table is not None) == any(asked.values())


def test_datacomp_small_has_the_settings_of_datacomp() -> None:
    """The published settings of the small scale (2304.14108), with open_clip's AdamW for a ViT."""
    (run,) = load_recipe("datacomp_small", []).runs
    (block,) = run.blocks
    optim, steps = run.optim, run.train.samples / block.samples
    assert block.samples == 4096 and run.train.samples == 12_800_000 and steps == 3125
    assert optim.base_lr * block.samples / 256 == pytest.approx(5e-4)
    assert optim.warmup * steps == pytest.approx(500)
    assert optim.name == "adamw" and optim.betas == [0.9, 0.98] and optim.weight_decay == 0.2
    assert run.model.name == "vit_base_patch32_clip_224" and run.model.reduce == "none"
