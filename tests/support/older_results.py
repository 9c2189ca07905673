"""Comparison of results with those that an older version recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands_of_9205be0 import SAME_MACHINE
from safetensors.torch import load_file

RECALL = "mean_per_class_recall"
LATER = ("prompts", RECALL, f"{RECALL}_low", f"{RECALL}_high")  # measures added since
ADDED = re.compile(r".*/effective_rank")
MEASURED = re.compile(r"seconds|samples/s|tokens/s|memory/gb|data/.*|save/.*")  # differ in each run


def as_then(results: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the measures of each suite that were added since."""
    return {
        name: {key: value for key, value in suite.items() if not key.endswith(LATER)}
        for name, suite in results.items()
    }


def assert_close(
    found: Any, recorded: Any, tolerance: float, where: str = "", exact: bool = SAME_MACHINE
) -> None:
    """Compare nested values: equal, or numbers within a tolerance on another machine."""
    if isinstance(recorded, Mapping):
        assert found.keys() == recorded.keys(), where
        for key, value in recorded.items():
            assert_close(found[key], value, tolerance, f"{where}.{key}", exact)
    elif isinstance(recorded, list):
        assert len(found) == len(recorded), where
        for number, (one, two) in enumerate(zip(found, recorded, strict=True)):
            assert_close(one, two, tolerance, f"{where}[{number}]", exact)
    elif isinstance(recorded, float) and not exact:
        assert found == pytest.approx(recorded, rel=tolerance, abs=tolerance), where
    else:
        assert found == recorded, where


def assert_same_weights(one: Path, two: Path, exact: bool) -> None:
    """Compare the artifacts of two runs: bit for bit, or nearly."""
    files = sorted(path.name for path in two.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in one.glob("*.safetensors"))
    for name in files:
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        for key in b:
            assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, (name, key)
            if exact:
                assert torch.equal(a[key], b[key]), (name, key)
            else:
                torch.testing.assert_close(a[key], b[key], rtol=1e-2, atol=2e-3)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_rows(
    found: list[dict[str, Any]], recorded: list[dict[str, Any]], exact: bool
) -> None:
    """Compare metrics: the same names in every row, and the same values except speeds.

    The row after a checkpoint also has save/..., unless the run was resumed there. Metrics of later
    versions are left out.
    """
    found = [{k: v for k, v in row.items() if not ADDED.fullmatch(k)} for row in found]
    names = [
        [[key for key in row if not key.startswith("save/")] for row in rows]
        for rows in (found, recorded)
    ]
    assert names[0] == names[1]
    for one, two in zip(found, recorded, strict=True):
        kept = [{k: v for k, v in row.items() if not MEASURED.fullmatch(k)} for row in (one, two)]
        if not exact:  # rounding decides between tokens of nearly equal scores, and their gradients
            norms = [row.pop("grad_norm", 0.0) for row in kept]
            assert norms[0] == pytest.approx(norms[1], rel=0.5)
        assert_close(*kept, tolerance=0.02, where=f"step {two['step']}", exact=exact)


def assert_contains(found: Any, recorded: Any, where: str) -> None:
    """Fail unless a config has every key of a recorded one, with the same value."""
    if isinstance(recorded, Mapping):
        for key, value in recorded.items():
            assert key in found, f"{where}.{key}"
            assert_contains(found[key], value, f"{where}.{key}")
    else:
        assert found == recorded, where
