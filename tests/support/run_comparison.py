"""Comparison of the losses, metrics and artifacts of two runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xray.artifacts.artifact import open_artifact
from xray.training.metrics import read_metrics

STEPS = ("loss", "grad_norm", "lr")
# Metrics that are measured, and so differ in every run.
MEASURED = ("seconds", "samples/s", "tokens/s", "mfu", "memory/gb")


def assert_equal_runs(one: Path, two: Path) -> None:
    """Assert that two recipe runs have bit-equal artifacts, metrics and results."""
    for stage in ("mae", "clip"):
        files = sorted((one / stage / "artifact").glob("*.safetensors"))
        assert files
        for file in files:
            a, b = load_file(file), load_file(two / stage / "artifact" / file.name)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a), file
        rows = [
            [
                json.loads(line)
                for line in (folder / stage / "metrics.jsonl").read_text().splitlines()
            ]
            for folder in (one, two)
        ]
        for row in (*rows[0], *rows[1]):
            for key in [k for k in row if k in MEASURED or k.startswith(("data/", "save/"))]:
                row.pop(key)
        assert rows[0] == rows[1]
    assert (one / "results.json").read_text() == (two / "results.json").read_text()


# Relative tolerance of fp32 losses whose sums have another order.
TOLERANCE = 1e-4


def assert_same_losses(one: Path, two: Path, expected: int) -> None:
    """Assert that two stage runs have the same losses and gradient norms in `expected` steps."""
    a, b = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert len(a) == len(b) == expected
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=TOLERANCE)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=100 * TOLERANCE)


def assert_same(one: Path, two: Path, exact: bool) -> None:
    """Assert that two stage runs of six steps have the same metrics.

    exact: metrics and artifact weights must be bit-equal; else only close metrics, and the same
    weight names.
    """
    rows_one, rows_two = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert len(rows_one) == len(rows_two) == 6
    for a, b in zip(rows_one, rows_two, strict=True):
        for name in STEPS:
            assert a[name] == (b[name] if exact else pytest.approx(b[name], rel=1e-4)), a["step"]
    artifacts = [open_artifact(folder / "artifact") for folder in (one, two)]
    for part in artifacts[0].manifest["tensors"]:
        first, second = (artifact.load(part) for artifact in artifacts)
        assert first.keys() == second.keys()
        for name in first:
            if exact:
                assert torch.equal(first[name], second[name]), name
