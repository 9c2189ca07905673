"""A suite that is added to SUITES and nowhere else works in every command that knows suites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from child_process import RECIPE, ROOT, SUPPORT, clean_environment
from tiny import train

Done = tuple[int, str, str]  # exit code, stdout, stderr


def commands(*arguments: list[str]) -> list[Done]:
    """Run commands of xray with the toy suite, in one process of their own."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "toy_suite.py"), json.dumps(arguments)],
        capture_output=True, text=True, timeout=600,
        env=clean_environment(PYTHONPATH=f"{SUPPORT}{os.pathsep}{ROOT}"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[Done] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_suite_is_added_in_one_place(demo: Path, tmp_path: Path) -> None:
    train("mae", demo, tmp_path / "mae", "train.samples=24")
    artifact, out = str(tmp_path / "mae" / "artifact"), tmp_path / "out"
    data, own = f"data.root={demo}", "eval.toy.samples=heldout"
    run = ["run", RECIPE, data, f"out={tmp_path / 'run'}", "stages=[mae]"]
    config, missing, result, rates, unset, unknown = commands(
        ["config", "eval", "eval.toy.modality=video"],
        [*run, "eval.toy.samples=nowhere"],
        ["eval", artifact, data, own, "--out", str(out)],
        ["eval", artifact, data, own, "--keep-rates", "1,.5", "--out", str(out / "rates.json")],
        ["eval", artifact, data, "--suite", "toy"],
        ["eval", artifact, data, own, "--suite", "toys"],
    )

    assert config[0] == 0 and "  toy:\n    samples: ''\n    modality: video\n" in config[1]
    assert missing[0] == 2 and "eval.toy.samples=nowhere: there is no" in missing[2]
    assert not (tmp_path / "run" / "mae" / "metrics.jsonl").exists()  # nothing was trained
    assert unset[0] == 2 and "suite toy has no data: set eval.toy.samples" in unset[2]
    assert unknown[0] == 2 and "token_selection, toy" in unknown[2]

    assert result[0] == 0, result
    measures = json.loads((out / "results.json").read_text())["toy"]
    assert list(json.loads((out / "results.json").read_text())) == ["toy"]
    assert "toy neighbours" in result[1] and "24 toys" in result[1]
    assert f"{100 * measures['chance_top1']:.2f}" in result[1]
    assert measures["chance_top1"] < 0.5 < measures["samples"] == 24

    assert rates[0] == 0 and "toy top1 %" in rates[1]
    by_rate = json.loads((out / "rates.json").read_text())
    assert list(by_rate) == ["1", "0.5"] and "toy/top1_low" in by_rate["0.5"]
    assert by_rate["0.5"]["gflops"] < by_rate["1"]["gflops"]
