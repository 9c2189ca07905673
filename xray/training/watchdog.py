"""Watchdog: ends a run that hangs, and names the rank at fault."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from xray import dist
from xray.files import write_text

FOLDER = "stuck"
SAVING = 4  # times the patience, for a large state on a slow disk
GRACE = 5.0  # seconds for the other ranks to notice the hang, too
COLLECTIVES = ("torch/distributed", "deepspeed/comm")  # code in which a rank waits for others


class Watchdog:
    """Thread that ends a run without progress.

    If `at` reports no new phase for `patience` seconds, every rank writes its phase and its
    threads' stacks to `stuck/rank_00000.*`, the lowest rank alive prints a verdict, and all exit
    with code 1. A patience of 0 disables it.
    """

    def __init__(self, out: Path, patience: float) -> None:
        self.folder = out / FOLDER
        self.patience = patience
        self._place, self._step, self._since, self._factor = "starting", 0, time.monotonic(), 1.0
        self._done = threading.Event()
        if patience > 0:
            self._clear()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, place: str, step: int, factor: float = 1.0) -> None:
        """Report that this rank enters a phase, which may take factor times the patience."""
        self._place, self._step = place, step
        self._since, self._factor = time.monotonic(), factor

    def close(self) -> None:
        """Stop watching."""
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(5.0, self.patience / 5)):
            if time.monotonic() - self._since > self.patience * self._factor:
                self._end()

    def _end(self) -> None:
        seconds = time.monotonic() - self._since
        try:
            self._write()
            time.sleep(GRACE + self.patience / 5)
            known = [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]
            line = ""
            if known and known[0]["rank"] == dist.rank():
                line = verdict(known, dist.world_size(), seconds, self.folder)
        except OSError as error:
            line = (
                f"no progress for {seconds:.0f} s at step {self._step + 1}, rank {dist.rank()} is "
                f"in {self._place}; {self.folder} cannot be written: {error}"
            )
        if line:
            print(f"xray: {line}", file=sys.stderr, flush=True)
        time.sleep(1.0)  # for the printing rank: a launcher ends all ranks when the first one exits
        os._exit(1)

    def _write(self) -> None:
        """Write the stacks of this rank's threads, then its phase."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        inside = frame.f_code.co_filename if frame else ""
        waits = any(part in inside for part in COLLECTIVES)
        facts = {"rank": dist.rank(), "host": socket.gethostname(), "pid": os.getpid()}
        facts |= {"place": self._place, "step": self._step, "waits": waits}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file(".txt").open("w") as file:
            faulthandler.dump_traceback(file)
        write_text(self._file(".json"), json.dumps(facts), self._file(".tmp"))

    def _file(self, ending: str) -> Path:
        return self.folder / f"rank_{dist.rank():05d}{ending}"

    def _clear(self) -> None:
        """Remove files of an earlier hang: of this rank, and of ranks that no longer exist."""
        for path in self.folder.glob("rank_*"):
            rank = int(path.stem.removeprefix("rank_"))
            if rank == dist.rank() or (dist.is_main() and rank >= dist.world_size()):
                path.unlink(missing_ok=True)


def verdict(known: list[dict], world: int, seconds: float, folder: Path) -> str:
    """Return a sentence that names the ranks the others wait for, from the files of all ranks."""
    silent = sorted(set(range(world)) - {facts["rank"] for facts in known})
    step = min(facts["step"] for facts in known)
    behind = [f for f in known if f["step"] == step and not f["waits"]]
    if silent:
        who = "; ".join(
            f"rank {rank} has written nothing: it is dead, frozen or unreachable"
            for rank in silent[:5]
        )
    elif behind and len(behind) < world:
        who = "; ".join(
            f"rank {f['rank']} ({f['host']}, process {f['pid']}) is in {f['place']}, while the "
            "others wait for it"
            for f in behind[:5]
        )
    else:
        who = f"no rank stands out, rank 0 is in {known[0]['place']}"
    return (
        f"no progress for {seconds:.0f} s at step {step + 1}: {who}; the stacks of all ranks are "
        f"in {folder}; the same command continues from the last checkpoint; train.hang_seconds "
        "limits the time without progress"
    )
