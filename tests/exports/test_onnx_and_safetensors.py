"""Exports to ONNX and plain safetensors compared with our features and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from export_checks import TOLERANCE, assert_refused, code_of, pixels_of, rewritten
from in_process import invoke

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import VisionEncoder, restore_encoder
from xray.config import TextConfig
from xray.models.text_tower import TextTower, merge_lora


@pytest.mark.parametrize(
    ("frames", "rate"), [(1, 0.5), pytest.param(4, 0.7, marks=pytest.mark.slow)]
)
def test_onnxruntime_gives_our_features(
    demo: Path, tagger: Path, tmp_path: Path, frames: int, rate: float
) -> None:
    done = invoke(
        "export", tagger, "--to", "onnx", "--out", tmp_path / "out", "--keep-rate", rate,
        "--frames", frames,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    source: Any = ("heldout", "image") if frames == 1 else ("clips", "video")
    pixels, encoder = pixels_of(demo, *source), restore_encoder(open_artifact(tagger))
    assert pixels.shape[1] == frames
    assert isinstance(encoder, VisionEncoder)
    encoder.keep_rate = rate
    given = encoder.normalize(pixels)
    given = given[:, 0] if frames == 1 else given
    names: dict[str, Any] = {"pixels": given.numpy()}
    exec(code_of(tmp_path / "out" / "README.md"), names)
    expected: Any = encoder
    for name, mine in (
        ("features", encoder.features(pixels)), ("probabilities", expected.probabilities(pixels)),
    ):  # fmt: skip
        theirs = torch.from_numpy(names[name])
        torch.testing.assert_close(theirs, mine, rtol=0, atol=TOLERANCE)
    assert (
        onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").get_inputs()[0].shape[0]
        == "batch"
    )


def test_plain_safetensors_contain_all_weights(control: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("export", control, "--to", "safetensors", "--out", out)
    assert done.exit_code == 0, done.stderr
    names: dict[str, Any] = {}
    exec(code_of(out / "README.md"), names)
    artifact = open_artifact(control)
    for name, value in artifact.load("backbone").items():
        assert torch.equal(names["vision"][name], value), name
    encoder: Any = restore_encoder(artifact)
    tokens = encoder.tokenizer(["a red circle", "a blue square on white"])
    ids = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        theirs = names["text"].eval()(**ids).last_hidden_state
        mine = encoder.text.llm(**ids).last_hidden_state
    mask = tokens["attention_mask"].bool()
    torch.testing.assert_close(theirs[mask], mine[mask])
    config = json.loads((out / "config.json").read_text())
    assert config["stage"] == "clip" and config["clip"]["text_head"] == "linear"


def test_lora_is_merged_into_the_weights(demo: Path) -> None:
    tower = TextTower(TextConfig(lora_rank=4, pooling="mean"), demo / "llm").eval()
    for name, parameter in tower.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(3, 200, (2, 9))
    masks = (torch.ones_like(ids), torch.ones_like(ids))
    with torch.no_grad():
        expected = tower(ids, *masks)
        plain = TextTower(TextConfig(lora_rank=0, pooling="mean", tune="none"), demo / "llm").eval()
        merged = merge_lora(tower.llm).state_dict()
        assert merged.keys() == plain.llm.state_dict().keys()
        assert not torch.allclose(plain(ids, *masks), expected, atol=1e-2)
        plain.llm.load_state_dict(merged)
        torch.testing.assert_close(plain(ids, *masks), expected)


@pytest.mark.parametrize("reduction", ["tome", "random"])
def test_onnx_refuses_other_token_reductions(tagger: Path, tmp_path: Path, reduction: str) -> None:
    config = open_artifact(tagger).manifest["config"]
    config |= {"model": config["model"] | {"reduce": reduction}}
    changed = rewritten(tagger, tmp_path / "other", config, {})
    done = invoke(
        "export", changed.path, "--to", "onnx", "--out", tmp_path / "o", "--keep-rate", 0.6
    )
    assert_refused(done, f"no graph for model.reduce={reduction}")
