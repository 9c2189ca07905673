"""Evaluations with settings as `xray eval` takes them."""

from __future__ import annotations

import json
from pathlib import Path

from in_process import invoke

from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import Encoder
from xray.config.loading import build, parse_overrides
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator


def results(clip: Artifact, out: Path, *arguments: object) -> dict[str, dict[str, float]]:
    done = invoke("eval", clip.path, *arguments, "--out", out / "results.json")
    assert done.exit_code == 0, done.stderr
    return json.loads((out / "results.json").read_text())


def config(*overrides: str) -> EvalConfig:
    return build(EvalConfig, parse_overrides(overrides).get("eval", {}))


def evaluator(clip: Artifact, demo: Path, *overrides: str) -> Evaluator:
    return Evaluator(Encoder(clip), config(*overrides), str(demo), 0)
