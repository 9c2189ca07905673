"""Runs of tools/chaos.py: a short one of some kinds of attempts, and long ones of all."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from child_process import ROOT, clean_environment

from tools.chaos import KINDS
from tools.faults.commands import Command, same_result


def attempts(folder: Path, kinds: Iterable[str], each: int, *options: str) -> None:
    """Attempt some kinds, each some times, and check that all held."""
    path, kinds = folder / "outcomes.json", list(kinds)
    command = [str(ROOT / "tools" / "chaos.py"), "--attempts", str(each), "--json", str(path)]
    command += ["--only", *kinds]
    done = subprocess.run(
        [sys.executable, *command, *options],
        capture_output=True,
        text=True,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tried = each * len(kinds)
    assert len(json.loads(path.read_text())) == tried
    assert f"| all | {tried} | {tried} |" in done.stdout


def test_one_attempt_holds(tmp_path: Path) -> None:
    """Processes that are frozen or lost and full disks have tests of their own."""
    attempts(tmp_path, ["kill", "flip", "hostile", "soak"], 1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("options", [(), ("--read-only",)], ids=["writable", "read-only"])
def test_many_attempts_of_each_kind_hold(options: tuple[str, ...], tmp_path: Path) -> None:
    attempts(tmp_path, KINDS, 30, "--seed", "1000", *options)


def test_what_does_not_hold_is_told(tmp_path: Path) -> None:
    """A traceback, a wrong exit code, a hang and other weights are faults."""
    command = object.__new__(Command)
    command.log = tmp_path / "log"
    command.log.write_text("xray: all is well")
    assert command.fault(0, (0,)) == "" and command.fault(2, (0, 2)) == ""
    assert command.fault(1, (0, 2)).startswith("exit code 1")
    assert command.fault(None, (0,)).startswith("hangs")
    command.log.write_text("Traceback (most recent call last):\n  ...\nKeyError: 1")
    assert command.fault(2, (0, 2)) == "traceback: KeyError: 1"
    for name, weights, loss in (("one", b"1", 2), ("two", b"2", 2), ("three", b"1", 3)):
        stage = tmp_path / name / "mae"
        (stage / "artifact").mkdir(parents=True)
        (stage / "artifact" / "backbone.safetensors").write_bytes(weights)
        row = {"loss": loss, "seconds": random.random()}
        (stage / "metrics.jsonl").write_text(f"{json.dumps(row)}\n")
    (tmp_path / "four" / "mae").mkdir(parents=True)
    compared = [same_result(tmp_path / "one", tmp_path / name) for name in ("one", "two", "three")]
    assert compared[0] == "" and compared[1].startswith("other weights in silence")
    assert compared[2].startswith("other metrics in silence")
    assert same_result(tmp_path / "one", tmp_path / "four").startswith("no mae/artifact")
