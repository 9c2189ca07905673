"""Single files in the layouts of MAE and VideoMAE."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from in_process import invoke
from released import shaken
from safetensors.torch import save_file

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import VisionEncoder
from xray.config import ModelConfig
from xray.config.data import IMAGENET
from xray.models.backbone import VisionBackbone
from xray.models.mae_checkpoints import clip_table

WIDTH, SIDE = 128, 32


def mae() -> Any:
    """Make timm's ViT of the sizes of a small MAE: heads of 64 channels."""
    sizes = {"patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "img_size": SIDE}
    return shaken(timm.create_model("vit_base_patch16_224", num_classes=0, **sizes))


def imported(path: Path, out: Path) -> VisionEncoder:
    done = invoke("import", path, "--out", out)
    assert done.exit_code == 0, done.output
    return VisionEncoder(open_artifact(out))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise clips [B, T, 3, S, S] uint8 as ImageNet's."""
    mean, std = (torch.tensor(x)[:, None, None] for x in IMAGENET)
    return (pixels.float() / 255 - mean) / std


@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
@torch.no_grad()
def test_mae(suffix: str, tmp_path: Path) -> None:
    model, path = mae(), tmp_path / f"mae{suffix}"
    state = model.state_dict() | {"mask_token": torch.zeros(1, 1, 64)}
    state["decoder_embed.weight"] = torch.zeros(64, WIDTH)
    if suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    pixels = torch.randint(0, 256, (2, 1, 3, SIDE, SIDE), dtype=torch.uint8)
    ours = imported(path, tmp_path / "artifact").features(pixels)
    theirs = F.normalize(model.forward_features(normalised(pixels)[:, 0])[:, 0], dim=-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_videomae(tmp_path: Path) -> None:
    """The file has neither positions nor the size of the clips: 16 frames of 224 px."""
    kwargs = {"patch_size": 56, "embed_dim": WIDTH, "depth": 1, "num_heads": 2, "fc_norm": False}
    own = ModelConfig("vit_base_patch16_224", {**kwargs, "class_token": False}, pool="mean",
                      clip_positions="tokens")  # fmt: skip
    backbone: Any = shaken(VisionBackbone(own, 224, 16))
    first, later = clip_table((8, 4, 4), WIDTH)
    backbone.pos_embed.copy_(first)
    backbone.pos_temporal.copy_(later)
    state = {k: v.clone() for k, v in backbone.state_dict().items() if not k.startswith("pos_")}
    queries, keys, values = state.pop("blocks.0.attn.qkv.bias").chunk(3)
    backbone.blocks[0].attn.qkv.bias[WIDTH : 2 * WIDTH] -= keys  # keys have none
    state |= {"blocks.0.attn.q_bias": queries, "blocks.0.attn.v_bias": values}
    named = {f"encoder.{name}": value.contiguous() for name, value in state.items()}
    save_file(named | {"mask_token": torch.zeros(1, 1, 8)}, tmp_path / "videomae.safetensors")
    encoder = imported(tmp_path / "videomae.safetensors", tmp_path / "artifact")
    clip = torch.randint(0, 256, (1, 16, 3, 224, 224), dtype=torch.uint8)
    theirs = F.normalize(backbone(normalised(clip)).cls, dim=-1)
    torch.testing.assert_close(encoder.features(clip), theirs, rtol=0, atol=1e-5)


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"model": mae().state_dict(), "args": argparse.Namespace()}, tmp_path / "mae.pth")
    done = invoke("import", tmp_path / "mae.pth", "--out", tmp_path / "artifact")
    assert done.exit_code == 2 and "cannot be read as plain tensors" in done.stderr
    assert done.stderr.strip().count("\n") == 0 and not (tmp_path / "artifact").exists()
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    done = invoke("import", tmp_path / "other.safetensors", "--out", tmp_path / "artifact")
    assert done.exit_code == 2 and "neither layout" in done.stderr
