"""Kills and freezes at random moments: of a run, of its children, and of one of its ranks."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tools.common.process_tree import at_work, descendants, freeze, wait_until
from tools.faults.commands import CODES, Command, Outcome, same_result, train

STAGES = ("stages=[mae,clip]",)
CHILDREN = ("data.workers=2", "data.blocks=[{source: photos, samples: 8}]")
RANKS = ("data.workers=0", "train.hang_seconds=4")
WORLD = 2
PATIENCE = 60.0  # seconds in which a rank ends, or tells that it waits for another one
MOMENTS = {"at any time": "start", "after a step": "step", "within a save": "save"}


def killed_run(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Kill a run of two stages up to three times, and let it end."""
    out, moment = folder / "run", rng.choice([*MOMENTS, "within a save"])
    fault, kills = "", 0
    for _ in range(rng.randint(1, 3)):
        running = train(out, data, *STAGES)
        if not _reach(running, out, MOMENTS[moment], rng):
            fault = fault or running.fault(running.wait(), (0,))
            break
        fault, kills = fault or running.kill(), kills + 1
    fault = fault or _finished(out, folder.parent / "unkilled", data, *STAGES)
    return Outcome(f"kill -9 of a run, {moment}", fault, kills)


def killed_child(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Kill a loader worker: one line and an exit code, then the same command ends well."""
    out = folder / "run"
    running = train(out, data, *CHILDREN)
    child = _some_child(running, rng)
    if child is not None:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    fault = running.fault(running.wait(), CODES)
    fault = fault or _finished(out, folder.parent / "loaded", data, *CHILDREN)
    return Outcome("kill -9 of a loader worker", fault, int(child is not None))


def frozen_children(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Freeze all children, kill the run, and look for what is left.

    Not before they have begun to work: one that is still starting is not yet tied to its parent.
    """
    out = folder / "run"
    running = train(out, data, *CHILDREN)
    fault, kills = "", 0
    child = _some_child(running, rng)
    if child is not None and wait_until(lambda: all(map(at_work, descendants(running.pid))), 30):
        freeze(descendants(running.pid))
        fault, kills = running.kill(), 1
    fault = fault or _finished(out, folder.parent / "loaded", data, *CHILDREN)
    return Outcome("kill -9 of a run whose children are frozen", fault, kills)


def frozen_run(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Freeze a run with its children, continue it, and compare the result."""
    out, fault = folder / "run", ""
    running = train(out, data, *CHILDREN)
    reached = _reach(running, out, rng.choice([*MOMENTS.values()]), rng)
    if reached:
        group = [psutil.Process(running.pid), *descendants(running.pid)]
        freeze(group)
        time.sleep(rng.uniform(0, 1))
        for process in group:
            with suppress(psutil.NoSuchProcess):  # it had ended as it was frozen
                process.send_signal(signal.SIGCONT)
    fault = running.fault(running.wait(), (0,))
    fault = fault or same_result(folder.parent / "loaded", out)
    return Outcome("run frozen and continued", fault, int(reached))


def lost_rank(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Kill or freeze one of two ranks: the other ends with one line; then both end well.

    Not before the first step, when ranks wait for those to come. A launcher that watches the ranks
    ends the others; here they end by themselves in a step, or tell for whom they wait.
    """
    out, how = folder / "run", rng.choice(("killed", "frozen"))
    ranks = start_ranks(out, data)
    lost, other = rng.sample(ranks, 2)
    reached = _reach(lost, out, "step", rng)
    if reached:
        os.kill(lost.pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    fault = _alone(other, lost) if reached else other.fault(other.wait(), (0,))
    if reached:
        lost.kill()
    else:
        fault = fault or lost.fault(lost.wait(), (0,))
    if not fault:
        again = start_ranks(out, data)
        faults = [rank.fault(rank.wait(), (0,)) for rank in again]
        fault = "; ".join(filter(None, faults)) or same_result(folder.parent / "ranks", out)
    return Outcome(f"one of two ranks {how}", fault, int(reached))


def _alone(other: Command, lost: Command) -> str:
    """Wait for the rank that is left; returns what is wrong with its end."""
    code = other.wait(PATIENCE)
    waits = f"process {lost.pid})" in other.log.read_text("utf-8", errors="replace")
    return "" if code is None and waits else other.fault(code, CODES)


def start_ranks(out: Path, data: Path) -> list[Command]:
    """Start the two ranks of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        train(out, data, *RANKS, env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(WORLD)
    ]


def _reach(running: Command, out: Path, moment: str, rng: random.Random) -> bool:
    """Wait for a random moment; False if the run has ended before."""
    before = _steps(out)
    started, pause = time.monotonic(), rng.uniform(0, 2)
    while running.code() is None:
        if moment == "save" and any(out.glob("*/checkpoints/tmp-*")):
            time.sleep(rng.uniform(0, 0.03))
            if _stopped_in_save(running, out):
                return True
        passed = time.monotonic() - started > pause
        if {"start": passed, "step": _steps(out) != before, "save": False}[moment]:
            return True
        time.sleep(0.001)
    return False


def _stopped_in_save(running: Command, out: Path) -> bool:
    """Stop a run; if it is not within a save, it continues."""
    if running.code() is not None:
        return False
    os.kill(running.pid, signal.SIGSTOP)
    if any(out.glob("*/checkpoints/tmp-*")):
        return True
    os.kill(running.pid, signal.SIGCONT)
    return False


def _steps(out: Path) -> int:
    """Return the size of all metrics, which grows with every step: their files are empty before."""
    return sum(path.stat().st_size for path in out.glob("*/metrics.jsonl"))


def _some_child(running: Command, rng: random.Random) -> psutil.Process | None:
    """Wait for children and a random time, and return one; None if the run has ended before."""
    while running.code() is None:
        if descendants(running.pid):
            time.sleep(rng.uniform(0, 0.5))
            # Some run for a moment, such as git.
            if alive := [child for child in descendants(running.pid) if child.is_running()]:
                return rng.choice(alive)
        time.sleep(0.001)
    return None


def _finished(out: Path, reference: Path, data: Path, *settings: str) -> str:
    """Run the command again until it ends, and compare its result with an undisturbed one's."""
    running = train(out, data, *settings)
    fault = running.fault(running.wait(), (0,))
    return fault or same_result(reference, out)
