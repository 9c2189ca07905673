"""Templates of zero-shot prompts: those of open_clip, of a file, and of the config."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip import zero_shot_metadata

from xray.artifacts.encoders import class_weights
from xray.config.identity import identity
from xray.config.loading import build
from xray.errors import ConfigError, DataError
from xray.evaluation.config import EvalConfig
from xray.evaluation.datasets import check_sets
from xray.evaluation.prompts import prompt_templates
from xray.evaluation.suites import result_table
from xray.evaluation.suites.zero_shot import ZERO_SHOT, ZeroShotConfig

LISTS = {
    "openai": zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES,
    "simple": zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES,
}


def config(**keys: Any) -> ZeroShotConfig:
    own = build(EvalConfig, {"zero_shot": keys}, section="eval.")
    own.validate()
    return own.of(ZERO_SHOT)


@pytest.mark.parametrize(("name", "size"), [("openai", 80), ("simple", 7)])
def test_the_classifier_equals_that_of_open_clip(name: str, size: int) -> None:
    torch.manual_seed(0)
    table = torch.nn.EmbeddingBag(128, 24)

    class Model(torch.nn.Module):
        def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            rows = table(tokens)
            return F.normalize(rows, dim=-1) if normalize else rows

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[ord(c) % 128 for c in text.ljust(64)] for text in texts])

    names, templates = (
        ["cat", "{c} dog", "fire truck"],
        prompt_templates(config(templates=name), ""),
    )
    assert len(templates) == len(LISTS[name]) == size
    with torch.no_grad():
        theirs = open_clip.build_zero_shot_classifier(Model(), tokenize, names, LISTS[name])
        mine = class_weights(lambda texts: table(tokenize(list(texts))), names, templates)
    assert (mine - theirs.t()).abs().max() < 1e-6
    few = class_weights(lambda texts: table(tokenize(list(texts))), names, templates[:3])
    assert (few - theirs.t()).abs().max() > 1e-3  # the comparison sees a missing template


def test_templates_of_a_file_and_of_the_config(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {c}, a pet.\n\n  art of {} \r\n", "utf-8")
    expected = ["a photo of a {}, a pet.", "art of {}"]
    assert prompt_templates(config(templates="templates.txt"), str(tmp_path)) == expected
    assert prompt_templates(config(templates=str(file)), "") == expected
    assert prompt_templates(config(templates=expected), "") == expected
    assert prompt_templates(config(templates="one {c}"), "") == ["one {}"]
    assert prompt_templates(config(), "") == ["a photo of a {}"]
    assert identity(config())["templates"] == ["a photo of a {}"]  # as older evaluations record it


def test_wrong_templates_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ([], "", ["a {}", "a"]):
        with pytest.raises(ConfigError, match=r"eval\.zero_shot\.templates: each needs {} or {c}"):
            config(templates=wrong)
    file = tmp_path / "templates.txt"
    for text, message in (("a {}\na dog\n", "line 2 is 'a dog': it needs"), ("\n", "is empty")):
        file.write_text(text, "utf-8")
        with pytest.raises(DataError, match=message):
            prompt_templates(config(templates=str(file)), "")
    (tmp_path / "set").mkdir()
    keys = {"zero_shot": {"shards": "set", "templates": "opnai"}}
    with pytest.raises(ConfigError, match=r"eval\.zero_shot\.templates=opnai: there is no"):
        check_sets(build(EvalConfig, keys), ["zero_shot"], str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"=openai reads .* pip install 'xray-trainer\[open_clip\]'"
    ):
        config(templates="openai")


def test_the_table_says_that_one_prompt_was_used() -> None:
    measures = {"samples": 8.0, "classes": 2.0, "prompts": 1.0}
    measures |= {f"{chance}{k}": 0.5 for chance in ("", "chance_") for k in ("top1", "top5")}
    (note,) = result_table({"zero_shot": measures}).notes
    assert note.startswith("zero-shot: one prompt for each class")
    assert result_table({"zero_shot": {**measures, "prompts": 80.0}}).notes == []
    del measures["prompts"]  # results of older versions
    assert result_table({"zero_shot": measures}).notes == []
