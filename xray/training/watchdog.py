"""Watchdog: ends a run that hangs, and names the rank at fault."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed

from xray import dist
from xray.errors import ArtifactError
from xray.files import write_text
from xray.records import read_record

FOLDER = "stuck"
SAVING = 4  # times the patience, for a large state on a slow disk
GRACE = 5.0  # seconds for the other ranks to notice the hang, too
TRACE = "nccl_trace_"  # and the rank: NCCL's flight recorder, which torch's `torchfrtrace` reads
# Code in which a rank waits for others. NCCL's collectives return immediately, so that a rank waits
# where it reads a value from its device, in xray.dist.to_host, or where its device is synchronized.
WAITS = (
    *("torch/distributed", "torch/cuda", "deepspeed/comm", "deepspeed/runtime/zero"),
    *("xray/dist.py", "xray/agreement.py"),
)


class Watchdog:
    """Threads that end a run without progress, or after another rank has stopped.

    If `at` reports no new phase for `patience` seconds, every rank writes its phase and its
    threads' stacks to `stuck/rank_00000.*`, the lowest rank alive prints a verdict, and all exit
    with code 1. A patience of 0 disables it.
    """

    def __init__(self, out: Path, patience: float) -> None:
        self.folder = out / FOLDER
        self.patience = patience
        self._place, self._step, self._since, self._factor = "starting", 0, time.monotonic(), 1.0
        self.passes: Callable[[], int] = lambda: 0  # forward passes that the device has finished
        self._done = threading.Event()
        if patience > 0:
            self._clear()
            # Two threads: a frozen rank 0, whose process holds the store, never answers the second.
            for watch in (self._watch, self._watch_others):
                threading.Thread(target=watch, name="watchdog", daemon=True).start()

    def at(self, place: str, step: int, factor: float = 1.0) -> None:
        """Report that this rank enters a phase, which may take factor times the patience."""
        self._place, self._step = place, step
        self._since, self._factor = time.monotonic(), factor

    def close(self) -> None:
        """Stop watching."""
        self._done.set()

    def _watch(self) -> None:
        while not self._pause():
            if time.monotonic() - self._since > self.patience * self._factor:
                self._end()

    def _watch_others(self) -> None:
        """End this process if another rank has stopped, for which it may wait in a collective."""
        while not self._pause():
            with contextlib.suppress(RuntimeError):  # the store is gone: this rank will notice
                failure = dist.reported_failure()
                if failure is not None:
                    if dist.is_main():
                        print(f"xray: {failure}", file=sys.stderr, flush=True)
                    os._exit(1)

    def _pause(self) -> bool:
        """Wait until the next look; True if there is none."""
        return self._done.wait(min(5.0, self.patience / 5))

    def _end(self) -> None:
        seconds = time.monotonic() - self._since
        try:
            self._write()
            time.sleep(GRACE + self.patience / 5)
            paths = sorted(self.folder.glob("*.json"))
            known = [read_record(path, dict[str, Any]) for path in paths]
            line = ""
            if known and known[0]["rank"] == dist.rank():
                line = verdict(known, dist.world_size(), seconds, self.folder)
        except (OSError, ArtifactError) as error:
            line = (
                f"no progress for {seconds:.0f} s at step {self._step + 1}, rank {dist.rank()} is "
                f"in {self._place}; {self.folder} cannot be used: {error}"
            )
        if line:
            print(f"xray: {line}", file=sys.stderr, flush=True)
        time.sleep(1.0)  # for the printing rank: a launcher ends all ranks when the first one exits
        os._exit(1)

    def _write(self) -> None:
        """Write the stacks of this rank's threads, then its phase."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        inside = frame.f_code.co_filename if frame else ""
        waits = any(part in inside for part in WAITS)
        facts = {"rank": dist.rank(), "host": socket.gethostname(), "pid": os.getpid()}
        facts |= {"place": self._place, "step": self._step, "waits": waits}
        with contextlib.suppress(RuntimeError):  # a device that has failed
            facts["passes"] = self.passes()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file(".txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        write_text(self._file(".json"), json.dumps(facts), self._file(".tmp"))
        # The recorder's locks may be held by what hangs.
        recorder = threading.Thread(target=self._write_trace, daemon=True)
        recorder.start()
        recorder.join(GRACE)

    def _write_trace(self) -> None:
        """Write NCCL's flight recorder, if there is one."""
        with contextlib.suppress(RuntimeError, OSError):  # the verdict needs no trace
            trace = nccl_trace()
            if trace is not None:
                self._trace(dist.rank()).write_bytes(trace)

    def _trace(self, rank: int) -> Path:
        return self.folder / f"{TRACE}{rank:05d}"

    def _file(self, ending: str) -> Path:
        return self.folder / f"rank_{dist.rank():05d}{ending}"

    def _clear(self) -> None:
        """Remove files of an earlier hang: of this rank, and of ranks that no longer exist."""
        for path in [*self.folder.glob("rank_*"), *self.folder.glob(f"{TRACE}*")]:
            rank = int(path.stem.removeprefix("rank_").removeprefix(TRACE))
            if rank == dist.rank() or (dist.is_main() and rank >= dist.world_size()):
                path.unlink(missing_ok=True)


def nccl_trace() -> bytes | None:
    """Return NCCL's flight recorder as a pickle, if the ranks use NCCL and torch has recorded it.

    TORCH_FR_BUFFER_SIZE sets its length (TORCH_NCCL_TRACE_BUFFER_SIZE in earlier torch).
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or not torch.distributed.is_initialized():
        return None
    return bytes(dump()) if "nccl" in torch.distributed.get_backend() else None


def verdict(known: list[dict], world: int, seconds: float, folder: Path) -> str:
    """Return a sentence that names the ranks the others wait for, from the files of all ranks."""
    silent = sorted(set(range(world)) - {facts["rank"] for facts in known})
    step = min(facts["step"] for facts in known)
    last = [f for f in known if f["step"] == step]
    behind, why = [f for f in last if not f["waits"]], ""
    if len(behind) in (0, world):  # all wait, for example to read a value from their devices
        fewest = min(f.get("passes", 0) for f in last)
        behind = [f for f in last if f.get("passes", 0) == fewest]
        why = f" and has finished {fewest} forward passes"
    if silent:
        who = "; ".join(
            f"rank {rank} has written nothing: it is dead, frozen or unreachable"
            for rank in silent[:5]
        )
    elif behind and len(behind) < world:
        who = "; ".join(
            f"rank {f['rank']} ({f['host']}, process {f['pid']}) is in {f['place']}{why}, while "
            "the others wait for it"
            for f in behind[:5]
        )
    else:
        who = f"no rank stands out, rank 0 is in {known[0]['place']}"
    return (
        f"no progress for {seconds:.0f} s at step {step + 1}: {who}; the stacks of all ranks are "
        f"in {folder}; the same command continues from the last checkpoint; train.hang_seconds "
        "limits the time without progress"
    )
