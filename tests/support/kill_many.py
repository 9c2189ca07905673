"""Kill a recipe at random moments, again and again, and let it go on each time.

usage: kill_many.py KILLS SEED OUT SETTING...

Each start is forked from this process, which has imported everything: a kill costs no imports.
OUT/unkilled is a run without kills, OUT/0, 1, ... are those that were killed until they were done.
A quarter of the kills come at any moment, a quarter once there were steps, half within a save.
Prints what was met, as json.
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

KINDS = ("save", "start", "save", "step")  # of kills, in turns


def start(out: Path, settings: list[str]) -> int:
    """`xray run` in a child; returns its id."""
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
    return any(out.glob("*/checkpoints/tmp-*"))


def ended(child: int, out: Path) -> bool:
    """Whether a run came to its end; raises RuntimeError if it failed."""
    found, status = os.waitpid(child, os.WNOHANG)
    if found and status:
        log = out.with_suffix(".log").read_text()[-2000:]
        raise RuntimeError(f"{out} ended with status {status}: {log}")
    return bool(found)


def wait(child: int, out: Path) -> None:
    while not ended(child, out):
        time.sleep(0.01)


def begun(out: Path) -> tuple[float, ...]:
    """Changes with every step."""
    return tuple(path.stat().st_mtime for path in out.glob("*/metrics.jsonl"))


def caught_saving(child: int, out: Path, rng: random.Random) -> bool:
    """Whether a run was stopped within a save; it goes on where it was not."""
    if not saving(out):
        return False
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGSTOP)
    if saving(out):
        return True
    os.kill(child, signal.SIGCONT)
    return False


def kill(child: int, out: Path, kind: str, rng: random.Random, seconds: float) -> str:
    """Kill a run at a random moment; returns when that was, "" if it ended before."""
    before = begun(out)
    while kind != "start" and begun(out) == before:
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
    return "before its first step" if begun(out) == before else "after a step"


def left_of(sessions: set[int]) -> list[str]:
    """Processes that outlived the runs that began them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) in sessions:
                found.append(process.name())
    return found


def main() -> None:
    kills, seed, folder, settings = *map(int, sys.argv[1:3]), Path(sys.argv[3]), sys.argv[4:]
    rng, met, sessions = random.Random(seed), Counter[str](), set()
    started = time.monotonic()
    wait(start(folder / "unkilled", settings), folder / "unkilled")
    seconds = time.monotonic() - started
    runs = 0
    while met.total() < kills:
        out = folder / str(runs)
        child = start(out, settings)
        sessions.add(child)
        moment = kill(child, out, KINDS[met.total() % len(KINDS)], rng, seconds / 4)
        if moment:
            met[moment] += 1
        else:
            runs += 1
    if (folder / str(runs)).exists():  # the last one is let through
        wait(start(folder / str(runs), settings), folder / str(runs))
        runs += 1
    deadline = time.monotonic() + 600  # a loader worker looks for its parent every 5 seconds
    while (left := left_of(sessions)) and time.monotonic() < deadline:
        time.sleep(0.5)
    print(json.dumps({"met": met, "runs": runs, "left": left, "seconds": seconds}))


if __name__ == "__main__":
    main()
