"""Kills a recipe at random moments, many times, and resumes it each time.

usage: kill_many.py KILLS SEED OUT SETTING...

Each run is forked from this process, which has already imported everything, so a restart is fast.
OUT/unkilled is a run without kills. OUT/0, 1, ... are runs that were killed and resumed until they
finished. A quarter of the kills come at any time, a quarter after the first step, half during a
save. Prints the numbers of kills by moment, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from child_process import RECIPE

from xray.commands.main import main as xray_main

KINDS = ("save", "start", "save", "step")  # kinds of kills, used in turn


def start(out: Path, settings: list[str]) -> int:
    """Fork a child that runs `xray run`; return its process id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    with out.with_suffix(".log").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.argv = ["xray", "run", RECIPE, f"out={out}", *settings]
    try:
        xray_main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    else:
        code = 0
    os._exit(code)


def saving(out: Path) -> bool:
    """Check if a run is writing a checkpoint."""
    return any(out.glob("*/checkpoints/tmp-*"))


def ended(child: int, out: Path) -> bool:
    """Check if a run has finished; raises RuntimeError if it failed."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid and status:
        log = out.with_suffix(".log").read_text()[-2000:]
        raise RuntimeError(f"{out} ended with status {status}: {log}")
    return bool(pid)


def wait(child: int, out: Path) -> None:
    """Wait until a run has finished."""
    while not ended(child, out):
        time.sleep(0.01)


def step_times(out: Path) -> tuple[float, ...]:
    """Return the mtimes of the metrics files; they change with every step."""
    return tuple(path.stat().st_mtime for path in out.glob("*/metrics.jsonl"))


def caught_saving(child: int, out: Path, rng: random.Random) -> bool:
    """Try to stop a run (SIGSTOP) during a save; True if it is stopped, else it continues."""
    if not saving(out):
        return False
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGSTOP)
    if saving(out):
        return True
    os.kill(child, signal.SIGCONT)
    return False


def kill(child: int, out: Path, kind: str, rng: random.Random, seconds: float) -> str:
    """Kill a run at a random moment; return a name of the moment, "" if the run ended before."""
    before = step_times(out)
    while kind != "start" and step_times(out) == before:
        if ended(child, out):
            return ""
        time.sleep(0.001)
    deadline = time.monotonic() + rng.uniform(0, seconds)
    while time.monotonic() < deadline or (kind == "save" and not caught_saving(child, out, rng)):
        if ended(child, out):
            return ""
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if saving(out):
        return "within a save"
    return "before its first step" if step_times(out) == before else "after a step"


def left_of(sessions: set[int]) -> list[str]:
    """List processes of killed runs that are still alive, by session id."""
    alive = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) in sessions:
                alive.append(process.name())
    return alive


def main() -> None:
    """Run the recipe once without kills, then kill and resume it until KILLS are done."""
    kills, seed, folder, settings = *map(int, sys.argv[1:3]), Path(sys.argv[3]), sys.argv[4:]
    rng, kill_counts, sessions = random.Random(seed), Counter[str](), set()
    started = time.monotonic()
    wait(start(folder / "unkilled", settings), folder / "unkilled")
    seconds = time.monotonic() - started
    runs = 0
    while kill_counts.total() < kills:
        out = folder / str(runs)
        child = start(out, settings)
        sessions.add(child)
        moment = kill(child, out, KINDS[kill_counts.total() % len(KINDS)], rng, seconds / 4)
        if moment:
            kill_counts[moment] += 1
        else:
            runs += 1
    if (folder / str(runs)).exists():  # finish the last run without kills
        wait(start(folder / str(runs), settings), folder / str(runs))
        runs += 1
    deadline = time.monotonic() + 600  # a loader worker checks for its parent every 5 seconds
    while (left := left_of(sessions)) and time.monotonic() < deadline:
        time.sleep(0.5)
    print(json.dumps({"met": kill_counts, "runs": runs, "left": left, "seconds": seconds}))


if __name__ == "__main__":
    main()
