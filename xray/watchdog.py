"""Names the rank that hangs or falls behind."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xray import dist

FOLDER = "stuck"
SAVING = 4  # times the patience: a large state on a slow disk
GRACE = 5.0  # seconds in which the other ranks notice that nothing moves, too
COLLECTIVES = ("torch/distributed", "deepspeed/comm")  # where a rank waits for the others
SLOW = 1.5  # times the median rank's time


class Watchdog:
    """Ends a run in which nothing moves any more, and says who is to blame.

    The training loop says where it is; a thread looks whether that changes. After `patience`
    seconds every rank writes its place and the stacks of its threads to `stuck/rank_00000.*`, the
    lowest that can prints what they tell, and all exit with code 1.
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
        """Where this rank is now, for at most factor times the patience."""
        self._place, self._step = place, step
        self._since, self._factor = time.monotonic(), factor

    def close(self) -> None:
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
            if known and known[0]["rank"] == dist.rank():
                line = verdict(known, dist.world_size(), seconds, self.folder)
                print(f"xray: {line}", file=sys.stderr, flush=True)
        except OSError as error:
            print(
                f"xray: nothing has moved for {seconds:.0f} s at step {self._step + 1}, rank "
                f"{dist.rank()} is in {self._place}; {self.folder} cannot be written: {error}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(1.0)  # for who prints; a launcher ends all with the first
        os._exit(1)

    def _write(self) -> None:
        """The stacks of this rank's threads, then where it is."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        inside = frame.f_code.co_filename if frame else ""
        waits = any(part in inside for part in COLLECTIVES)
        facts = {"rank": dist.rank(), "host": socket.gethostname(), "pid": os.getpid()}
        facts |= {"place": self._place, "step": self._step, "waits": waits}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file(".txt").open("w") as file:
            faulthandler.dump_traceback(file)
        self._file(".tmp").write_text(json.dumps(facts))
        os.replace(self._file(".tmp"), self._file(".json"))

    def _file(self, ending: str) -> Path:
        return self.folder / f"rank_{dist.rank():05d}{ending}"

    def _clear(self) -> None:
        """Remove what an earlier hang has left of this rank, and of ranks that are no more."""
        for path in self.folder.glob("rank_*"):
            rank = int(path.stem.removeprefix("rank_"))
            if rank == dist.rank() or (dist.is_main() and rank >= dist.world_size()):
                path.unlink(missing_ok=True)


def verdict(known: list[dict], world: int, seconds: float, folder: Path) -> str:
    """Who holds up the others, by what the ranks have written about themselves."""
    silent = sorted(set(range(world)) - {facts["rank"] for facts in known})
    step = min(facts["step"] for facts in known)
    behind = [f for f in known if f["step"] == step and not f["waits"]]
    if silent:
        who = "; ".join(
            f"rank {rank} has written nothing: it is dead, frozen or cut off" for rank in silent[:5]
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
        f"nothing has moved for {seconds:.0f} s at step {step + 1}: {who}; the stacks of all "
        f"ranks are in {folder}; the same command goes on from the last checkpoint, and "
        "train.hang_seconds is how long a step may take"
    )


class Slowest:
    """How long each rank takes for its own part of the steps between two lines of the log.

    That is to wait for its data, and the forward passes of its towers: in all else of a step ranks
    wait for each other, so that a slow one takes no longer than they do. In ZeRO 3 they do so in
    the forward passes, too, where parameters are gathered, and data alone tell them apart.
    """

    def __init__(self, towers: nn.ModuleDict, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._steps = 0.0, 0
        self._in_step = False
        self._begun: Any = None
        self._passes: list[tuple[Any, Any]] = []  # of GPUs: events, read when they are past
        for tower in towers.values() if dist.world_size() > 1 else ():
            tower.register_forward_pre_hook(self._begin)
            tower.register_forward_hook(self._end)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *_: Any) -> None:
        self._begun = self._now()

    def _end(self, *_: Any) -> None:
        if not self._in_step:  # a validation's
            return
        if self._cuda:
            self._passes.append((self._begun, self._now()))
        else:
            self._seconds += self._now() - self._begun

    def start(self) -> None:
        self._in_step = True

    def stop(self, waited: float) -> None:
        """A step is done, whose data had to be waited for some seconds."""
        self._seconds += waited
        self._steps += 1
        self._in_step = False

    def compare(self) -> tuple[dict[str, float], str | None]:
        """The slowest rank's time over the median one's, and a warning; collective."""
        self._seconds += sum(begin.elapsed_time(end) for begin, end in self._passes) / 1000
        everyone = dist.gather_objects((self._seconds / max(1, self._steps), socket.gethostname()))
        self._seconds, self._steps, self._passes = 0.0, 0, []
        times = [seconds for seconds, _ in everyone]
        slowest = max(range(len(times)), key=times.__getitem__)
        usual = statistics.median_low(times)
        ratio = times[slowest] / max(usual, 1e-9)
        warning = None
        if ratio > SLOW:
            warning = (
                f"rank {slowest} ({everyone[slowest][1]}) holds up the others: "
                f"{times[slowest]:.2f} s a step for its own part, the median rank {usual:.2f} s"
            )
        return {"rank/slowest": ratio}, warning
