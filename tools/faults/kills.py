"""Kills at random moments: of a run, of its children, and of a run whose children are frozen."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil

from tools.common.process_tree import descendants, freeze
from tools.faults.commands import Command, Outcome, same_result, train

CHILDREN = ("data.workers=2", "data.blocks=[{source: photos, samples: 8}]")
MOMENTS = ("start", "step", "save")
RETRIES = 6  # of a command after a kill


def killed_run(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Kill a run, at any time, after a step or within a save, and resume it to the end."""
    out, moment = folder / "run", rng.choice(MOMENTS)
    kind = "kill -9 of a run"
    faults = ""
    for _ in range(rng.randint(1, 3)):
        running = train(out, data)
        if not _reach(running, out, moment, rng):
            break
        faults = faults or running.kill()
    return Outcome(kind, faults or _finished(out, folder.parent / "unkilled", data))


def killed_child(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Kill a loader worker: one line and an exit code, then the same command ends well."""
    out = folder / "run"
    running = train(out, data, *CHILDREN)
    child = _some_child(running, rng)
    if child is not None:
        child.kill()
    fault = running.fault(running.wait(), (0, 1, 2))
    return Outcome(
        "kill -9 of a child", fault or _finished(out, folder.parent / "loaded", data, *CHILDREN)
    )


def frozen_children(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Freeze all children, kill the run, and look for what is left."""
    out = folder / "run"
    running = train(out, data, *CHILDREN)
    fault = ""
    if _some_child(running, rng) is not None:
        freeze(descendants(running.pid))
        fault = running.kill()
    return Outcome(
        "kill -9 over frozen children",
        fault or _finished(out, folder.parent / "loaded", data, *CHILDREN),
    )


def frozen_run(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Freeze a run with its children, continue it, and compare the result."""
    out = folder / "run"
    running = train(out, data, *CHILDREN)
    if _reach(running, out, rng.choice(MOMENTS), rng):
        group = [psutil.Process(running.pid), *descendants(running.pid)]
        freeze(group)
        time.sleep(rng.uniform(0, 1))
        for process in group:
            process.send_signal(signal.SIGCONT)
        fault = running.fault(running.wait(), (0,))
    else:
        fault = ""
    reference = folder.parent / "loaded"
    return Outcome("run frozen and continued", fault or same_result(reference, out))


def _reach(running: Command, out: Path, moment: str, rng: random.Random) -> bool:
    """Wait for a random moment; False if the run has ended before."""
    metrics = out / "mae" / "metrics.jsonl"
    before = metrics.stat().st_mtime if metrics.exists() else 0.0
    started, pause = time.monotonic(), rng.uniform(0, 2)
    while running.code() is None:
        passed = time.monotonic() - started > pause
        stepped = metrics.exists() and metrics.stat().st_mtime != before
        saving = any(out.glob("*/checkpoints/tmp-*"))
        if {"start": passed, "step": stepped, "save": saving}[moment]:
            return True
        time.sleep(0.001)
    return False


def _some_child(running: Command, rng: random.Random) -> psutil.Process | None:
    """Wait for children and a random time, and return one; None if the run has ended before."""
    while running.code() is None:
        if children := descendants(running.pid):
            time.sleep(rng.uniform(0, 0.5))
            # Some run for a moment, such as git.
            if alive := [child for child in children if child.is_running()]:
                return rng.choice(alive)
        time.sleep(0.001)
    return None


def _finished(out: Path, reference: Path, data: Path, *settings: str) -> str:
    """Run the command again until it ends, and compare its result with an undisturbed one's."""
    running = train(out, data, *settings)
    fault = running.fault(running.wait(), (0,))
    return fault or same_result(reference, out)
