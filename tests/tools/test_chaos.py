"""A short run of tools/chaos.py: each kind of attempt once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from child_process import ROOT, clean_environment

from tools.chaos import KINDS
from tools.faults.commands import Command, same_result


def test_one_attempt_of_each_kind_holds(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    command = [str(ROOT / "tools" / "chaos.py"), "--attempts", "1", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=clean_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(path.read_text())
    assert len(outcomes) == len(KINDS)
    assert f"| all | {len(KINDS)} | {len(KINDS)} |" in done.stdout


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
    for name, content in (("one", b"1"), ("two", b"2")):
        (tmp_path / name / "mae" / "artifact").mkdir(parents=True)
        (tmp_path / name / "mae" / "artifact" / "backbone.safetensors").write_bytes(content)
    assert same_result(tmp_path / "one", tmp_path / "one") == ""
    assert same_result(tmp_path / "one", tmp_path / "two") == "other weights in silence"
    assert same_result(tmp_path / "one", tmp_path / "three") == "no artifact"
