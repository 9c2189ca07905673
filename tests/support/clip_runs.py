"""Settings and comparisons that the tests of the clip stage share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import settings
from torch import Tensor

from stages.clip import ClipModule
from stages.clip_config import ClipConfig
from xray.training.metrics import read_metrics

PHOTOS = "data.blocks=[{source: photos, samples: 8}]"
LORA = ("text.tune=lora", "text.lora_rank=2")
SIGMOID = "clip.loss=sigmoid"
TWO, PREFIXES = "clip.captions=2", "clip.matryoshka=[4,8]"

State = dict[str, Tensor]


def rows_of(run: Path) -> list[dict[str, float]]:
    """Read the metrics that a run logged, one row per step."""
    return read_metrics(run / "metrics.jsonl")


def assert_same_training(one: Path, two: Path, steps: int) -> None:
    """Compare the losses, gradient norms and logit scales of two runs step by step."""
    mine, theirs = rows_of(one), rows_of(two)
    assert len(mine) == len(theirs) == steps
    for a, b in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm", "photos/logit_scale", "clips/logit_scale"):
            assert a[name] == pytest.approx(b[name], rel=2e-5), (name, a["step"])


def module_of(demo: Path, out: Path, *overrides: str) -> ClipModule:
    """Build a module without an LLM, which takes sentence vectors of width 8."""
    return ClipModule(settings("clip", demo, out, *overrides), None, 8)


def parts_equal(a: State, b: State, prefix: str = "") -> bool:
    """Compare the tensors of two parts of artifacts whose names begin with `prefix`."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(prefix))


def assert_names_keys(message: str, keys: list[str]) -> None:
    """Require that a message names these config keys, and no key that the config lacks."""
    named = re.findall(r"\b(?:clip|data|debug|model|optim|train)\.[a-z_][a-z_.]*[a-z]", message)
    assert set(keys) <= set(named)
    for key in named:
        value: Any = ClipConfig()
        for name in key.split("."):
            value = getattr(value, name)
