"""Frozen LLM weights in bf16: recorded by a run and its artifact, and exact after loading."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clip_runs import LORA, rows_of
from tiny import QUICK, train

from stages.clip import ClipModule, ClipStage
from xray.artifacts.encoders import Encoder
from xray.artifacts.manifest_config import text_config
from xray.errors import ConfigError

BF16 = "text.dtype=bf16"
TEXTS = ["a red circle on the grass", "two blue squares"]


@pytest.mark.parametrize("tune", ["none", "lora", "of a tuned model"])
def test_an_artifact_gives_the_features_of_its_run(
    demo: Path,
    tmp_path: Path,
    trained: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tune: str,
) -> None:
    modules: list[ClipModule] = []
    export = ClipStage.export

    def spy(self: ClipStage, module: ClipModule, state: Any) -> Any:
        modules.append(module)
        return export(self, module, state)

    monkeypatch.setattr(ClipStage, "export", spy)
    parents = []
    if tune == "of a tuned model":  # its weights are fp32
        photos = "data.blocks=[{source: photos, samples: 8}]"
        full = ("text.tune=full", "text.lora_rank=0", "train.samples=24")
        parents.append(trained("text", *full, photos))
    options = LORA if tune == "lora" else ("text.tune=none",)
    artifact = train("clip", demo, tmp_path, *QUICK, *options, BF16, init_from=parents)
    encoder = Encoder(artifact)
    for name, parameter in encoder.text.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
    tokens, module = encoder.tokenizer(TEXTS), modules[0].eval()
    with torch.no_grad():
        expected = module.text_adapter(module.towers["text"](**tokens))
    assert torch.equal(encoder.text_features(tokens), F.normalize(expected.float(), dim=-1))
    assert encoder.encode_text(TEXTS).dtype == torch.float32


def test_a_run_records_the_dtype_and_older_artifacts_have_fp32(demo: Path, tmp_path: Path) -> None:
    artifact = train("clip", demo, tmp_path, *QUICK, "text.tune=none", BF16)
    assert artifact.manifest["config"]["text"]["dtype"] == text_config(artifact).dtype == "bf16"
    manifest = copy.deepcopy(artifact.manifest)
    del manifest["config"]["text"]["dtype"]
    older = dataclasses.replace(artifact, manifest=manifest)
    assert text_config(older).dtype == "fp32"
    assert all(p.dtype == torch.float32 for p in Encoder(older).text.parameters())
    with pytest.raises(ConfigError, match=r"text\.dtype"):
        train("clip", demo, tmp_path, *QUICK, "text.tune=none")


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_training_is_close_to_that_with_fp32_weights(
    clip_run: Callable[..., Path], zero: int
) -> None:
    """A bf16 value has 8 significant bits."""
    options = *LORA, "text.lora_dropout=0.0", f"zero.stage={zero}"
    rows = [rows_of(clip_run(*options, dtype)) for dtype in ("text.dtype=fp32", BF16)]
    for whole, half in zip(*rows, strict=True):
        assert half["loss"] == pytest.approx(whole["loss"], rel=2e-2)
        assert half["loss"] != whole["loss"]
