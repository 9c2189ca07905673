"""MAE and hashtag losses added to the contrastive loss of the clip stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import QUICK, settings, train

from stages.base import Parents
from stages.clip import ClipModule, ClipStage
from stages.clip_auxiliary import AuxiliaryLosses
from stages.mae import MaeModule
from xray.errors import ConfigError
from xray.training.metrics import read_metrics


def test_all_three_losses_fall_and_a_split_block_trains_as_the_whole(
    demo: Path, tmp_path: Path
) -> None:
    more = ("clip.mae_weight=0.5", "clip.hashtag_weight=0.25", "mae.decoder_dim=32",
            "mae.decoder_depth=1", "mae.decoder_heads=2", "hashtag.min_count=2")  # fmt: skip
    made = train("clip", demo, tmp_path / "whole", *QUICK, *more)
    train("clip", demo, tmp_path / "split", *QUICK, *more, "train.micro_batch=2", "zero.stage=2")
    whole, split = (read_metrics(tmp_path / x / "metrics.jsonl") for x in ("whole", "split"))
    assert [r["loss"] for r in split] == pytest.approx([r["loss"] for r in whole], rel=2e-4)
    assert whole[-1]["photos/hashtag_loss"] < whole[0]["photos/hashtag_loss"]
    assert whole[-1]["clips/mae_loss"] < whole[0]["clips/mae_loss"]
    assert made.manifest["inputs"]["vocabulary"]
    assert not any("auxiliary" in t for part in made.manifest["tensors"].values() for t in part)


def test_settings_without_effect_in_the_clip_stage_are_refused(demo: Path, tmp_path: Path) -> None:
    for setting, message in (
        ("hashtag.truncate=0.1", r"hashtag.truncate=0.1 does nothing in the clip stage"),
        ("hashtag.teacher=x", r"hashtag.teacher=x does nothing"),
        ("mae.decoder_dim=30", r"mae.decoder_dim=30 must be a multiple"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings("clip", demo, tmp_path, "clip.hashtag_weight=1", "clip.mae_weight=1", setting)


def test_auxiliary_losses_equal_those_of_their_own_stages(demo: Path, tmp_path: Path) -> None:
    config = settings("clip", demo, tmp_path, "clip.mae_weight=1", "mae.decoder_dim=32",
                      "mae.decoder_depth=1", "mae.decoder_heads=2")  # fmt: skip
    torch.manual_seed(0)
    stage = ClipStage(config)
    stage.prepare({}, Parents())
    module: ClipModule = stage.build(Parents())
    alone = MaeModule(settings("mae", demo, tmp_path))
    alone.vision.load_state_dict(module.vision.state_dict())
    auxiliary = module.auxiliary
    assert isinstance(auxiliary, AuxiliaryLosses) and auxiliary.decoder is not None
    alone.decoder.load_state_dict(auxiliary.decoder.state_dict())
    batch = {
        "pixels": torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8),
        "mask_noise": torch.rand(3, 16),
    }
    pixels = module.normalize(batch["pixels"])
    mine = auxiliary(module, batch, pixels, torch.zeros(3, 32), 0.0)["mae_loss"]
    theirs = alone.loss_from_features(alone.features(batch, 0.0)).loss
    assert mine.shape == (3,) and torch.allclose(mine.mean(), theirs, atol=1e-5)
