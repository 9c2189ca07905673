"""Tables of parameter names: read to ours and back, every tensor is what and where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from released import of_backbone, of_open_clip, of_transformers
from safetensors.torch import load_file

from xray.exports.names import clip, open_clip, siglip, vit
from xray.exports.names.table import Names

TABLES = {
    "CLIPModel": (clip.VISION, "vision_model."),
    "SiglipModel": (siglip.VISION, "vision_model."),
    "Siglip2Model": (siglip.VISION_2, "vision_model."),
    "ViTModel": (vit.VIT, ""),
    "Dinov2WithRegistersModel": (vit.DINOV2, ""),
    "DINOv3ViTModel": (vit.DINOV3, ""),
    "DINOv3ViTModel gated": (vit.DINOV3_GATED, ""),
    "open_clip": (open_clip.VISION, "visual."),
}


@pytest.mark.parametrize("name", TABLES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    table, prefix = TABLES[name]
    if name == "open_clip":
        path = of_open_clip(tmp_path / "folder").folder / "open_clip_model.safetensors"
    else:
        write = of_transformers if prefix else of_backbone
        path = write(tmp_path / "folder", name).folder / "model.safetensors"
    state = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not table.ignored.match(k)}
    ours = table.to_ours(state)
    assert not ours.unknown and "blocks.1.attn.qkv.weight" in ours.state
    back = table.to_theirs(ours.state)
    assert not back.unknown and back.state.keys() == state.keys()
    assert all(torch.equal(back.state[key], state[key]) for key in state)
    told = [part for key in ours.state for part in table.theirs(key, prefix).split(" + ")]
    assert sorted({*told}) == sorted(prefix + key for key in state)


def test_a_part_of_joined_tensors_is_missing() -> None:
    """One of the three matrices that make `qkv` is missing: the others have no place."""
    state = {f"encoder.layers.0.self_attn.{part}_proj.weight": torch.zeros(2, 2) for part in "qk"}
    renamed = clip.VISION.to_ours(state)
    assert not renamed.state and renamed.unknown == sorted(state)
    assert renamed.missing == ["encoder.layers.0.self_attn.v_proj.weight"]


def test_blocks_are_numbered_as_they_are() -> None:
    names = Names(("blocks.*.fc", "layers.*.linear"))
    state = {f"layers.{number}.linear.weight": torch.full((1,), number) for number in (0, 2, 10)}
    renamed = names.to_ours({k: v.float() for k, v in state.items()}).state
    assert {key: int(value) for key, value in renamed.items()} == {
        f"blocks.{number}.fc.weight": number for number in (0, 2, 10)
    }
