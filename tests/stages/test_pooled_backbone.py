"""Stages, evaluation and exports with backbones without CLS token, and with rotary positions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from in_process import invoke
from tiny import settings, train

from stages import stage_class
from stages.base import Facts
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import VisionEncoder, restore_encoder
from xray.config.identity import config_hash
from xray.errors import ArtifactError

if TYPE_CHECKING:
    from conftest import Trained

SMALL = ("model.kwargs={patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}", "train.samples=24")
SIGLIP = ("model.name=vit_base_patch16_siglip_224", *SMALL)
DINOV3 = ("model.name=vit_small_patch16_dinov3", *SMALL)


@pytest.mark.parametrize(("pool", "model"), [("map", SIGLIP), ("mean", SIGLIP), ("cls", DINOV3)])
def test_an_artifact_goes_through_all_vision_stages(
    demo: Path, trained: Trained, media: Path, tmp_path: Path, pool: str, model: tuple[str, ...]
) -> None:
    options = (*model, f"model.pool={pool}")
    mae = trained("mae", *options)
    # with masked patches and all auxiliary losses, from the parent's weights
    clip = trained(
        "clip", *options, "clip.mask_ratio=0.5", "clip.mae_weight=1", "clip.hashtag_weight=1",
        "hashtag.min_count=2", init_from=(mae,),
    )  # fmt: skip
    artifact = open_artifact(clip)
    assert artifact.manifest["config"]["model"]["pool"] == pool
    stored = artifact.load("backbone")
    assert ("cls_token" in stored) == (pool == "cls")
    assert ("attn_pool.latent" in stored) == (pool == "map")
    encoder = restore_encoder(artifact)
    assert isinstance(encoder, VisionEncoder)
    assert encoder.vision.num_prefix_tokens == (5 if pool == "cls" else 0)
    pixels = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    assert encoder.features(pixels).isfinite().all()
    for command in (
        ("export", clip, "--to", "timm", "--out", tmp_path / "timm"),
        ("show", clip, media / "photo.jpg", media / "clip.mp4", "--out", tmp_path / "kept.png"),
        ("show", mae, media / "photo.jpg", "--out", tmp_path / "mae.png"),
    ):
        done = invoke(*command)
        assert done.exit_code == 0, (done.stderr, done.exception)


@pytest.mark.parametrize("pool", ["map", "mean"])
@pytest.mark.parametrize("stage", ["mae", "hashtag"])
def test_every_parameter_gets_a_gradient(demo: Path, tmp_path: Path, stage: str, pool: str) -> None:
    config = settings(stage, demo, tmp_path, *SIGLIP, f"model.pool={pool}")
    made = stage_class(stage)(config)
    module: Any = made.meta_module(Facts(tags=10)).train()
    module(made.example_batch(module, 4, 1, 32), 0.9).loss.backward()
    without = {name for name, p in module.named_parameters() if p.grad is None}
    assert not without


def test_the_pool_is_part_of_a_run_and_its_default_of_older_ones(
    demo: Path, tmp_path: Path
) -> None:
    default, map_ = (settings("mae", demo, tmp_path, *more) for more in ((), ("model.pool=map",)))
    assert config_hash(default.model) != config_hash(map_.model)
    assert config_hash(default.model) == config_hash(
        settings("mae", demo, tmp_path, "model.pool=cls").model
    )


def test_another_pool_than_the_parents_is_refused(
    demo: Path, trained: Trained, tmp_path: Path
) -> None:
    mae = trained("mae", *SIGLIP, "model.pool=map")
    with pytest.raises(ArtifactError, match=r"is missing .* model.kwargs and model.pool to the"):
        train("hashtag", demo, tmp_path, *SIGLIP, "model.pool=mean", init_from=(mae,))
