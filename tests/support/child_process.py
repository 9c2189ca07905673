"""Helpers that run xray and torchrun in child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
RECIPE = str(SUPPORT / "tiny_recipe.yaml")


def xray(*arguments: str, killed_at: str = "") -> subprocess.CompletedProcess[str]:
    """Run an xray command; killed_at: moment of a kill, see kill_helper.py."""
    command = ["-m", "xray"] if not killed_at else [str(SUPPORT / "kill_helper.py"), killed_at]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(OMP_NUM_THREADS="1"),  # models this small gain nothing from more
    )


def clean_environment(**more: str) -> dict[str, str]:
    """Copy the environment without the process group that tests here may have joined."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | more


def torchrun(*arguments: str) -> str:
    """Run two processes by torchrun; fail on an exit code, return their stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(PYTHONPATH=f"{SUPPORT}{os.pathsep}{ROOT}"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr
