"""Runs of two stages, killed at random moments, have the results of runs that were not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import SUPPORT, clean_environment
from run_comparison import assert_equal_runs


def killed(demo: Path, out: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill runs `kills` times and check each that ended; returns the number of kills by moment."""
    settings = [f"data.root={demo}", "stages=[mae,clip]", "train.samples=120"]
    settings.append("train.save_every=1")
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "kill_many.py"), str(kills), str(seed), str(out), *settings],
        capture_output=True,
        text=True,
        env=clean_environment(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["left"] == [] and sum(outcome["met"].values()) == kills
    for number in range(outcome["runs"]):
        assert_equal_runs(out / "unkilled", out / str(number))
    print(outcome)
    return outcome["met"]


def test_three_kills(demo: Path, tmp_path: Path) -> None:
    assert killed(demo, tmp_path, kills=3, seed=0)["within a save"] > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills(demo: Path, tmp_path: Path) -> None:
    met = killed(demo, tmp_path, kills=100, seed=1)
    assert (
        met["within a save"] > 20 and met["after a step"] > 5 and met["before its first step"] > 5
    )
