"""The runs of an ablation, each a process of its own, several at a time where devices allow."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from xray import dist
from xray.ablations.trials import Trial
from xray.errors import ConfigError, Preempted
from xray.files import locked, write_text
from xray.progress import LINE_SECONDS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL = 0.2  # seconds


@dataclass
class Failure:
    """A trial whose run did not end well."""

    trial: Trial
    code: int
    line: str  # the last of its log


@dataclass
class Job:
    """A running trial."""

    trial: Trial
    process: subprocess.Popen[bytes]
    slot: int
    begun: float = field(default_factory=time.monotonic)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[IO[str]]:
    """Hold an ablation's folder; its runs hold it too, and longer where this process is killed.

    Raises ConfigError where another process works in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(locked(out / "lock", fcntl.LOCK_NB))
        except BlockingIOError:
            pids = (out / "processes").read_text() if (out / "processes").is_file() else ""
            raise ConfigError(
                f"out={out} is worked on by another xray ablate, or by runs that one left behind "
                f"(processes {pids or 'unknown'}): wait for them, or end them"
            ) from None
        yield file


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name for a run."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


class Jobs:
    """Runs trials, never two at once that need the same unfinished stage run.

    at_once: 0 = one per GPU, one without. Raises Preempted after a signal, when all have saved.
    """

    def __init__(self, out: Path, at_once: int, lock: IO[Any]) -> None:
        self.out, self.lock = out, lock
        self.gpus = visible_gpus()
        self.at_once = at_once or max(1, len(self.gpus))
        self.running: list[Job] = []
        self.failures: list[Failure] = []
        self.stopped = False

    def run(self, trials: Sequence[Trial]) -> list[Failure]:
        """Run what is not finished; returns the trials that failed, the others done."""
        waiting = [trial for trial in trials if not trial.finished()]
        told = time.monotonic()
        previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            follow = Follow(len(waiting))
            while self.running or (waiting and not self.stopped):
                while not self.stopped and (chosen := self._next(waiting)) is not None:
                    waiting.remove(chosen)
                    self._start(chosen)
                time.sleep(POLL)
                for job in [job for job in self.running if job.process.poll() is not None]:
                    self._end(job, follow)
                if time.monotonic() - told > LINE_SECONDS:
                    told = time.monotonic()
                    follow.lines(self.running)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stopped:
            raise Preempted("stopped by a signal; the same command goes on")
        return self.failures

    def _next(self, waiting: Sequence[Trial]) -> Trial | None:
        """The first that may start: none of its stage runs is in another's work."""
        if len(self.running) >= self.at_once:
            return None
        taken = {name for job in self.running for name in job.trial.missing()}
        return next((t for t in waiting if not taken & set(t.missing())), None)

    def _start(self, trial: Trial) -> None:
        slot = min(set(range(self.at_once)) - {job.slot for job in self.running})
        for name in ("results.json", "done.json"):  # of other settings, or of half a run
            (trial.folder / name).unlink(missing_ok=True)
        recipe = str(trial.folder / "recipe.yaml")
        with (trial.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "xray", "run", recipe],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment(slot),
                pass_fds=[self.lock.fileno()],
            )
        self.running.append(Job(trial, process, slot))
        if self.stopped:  # by a signal that came while it was started
            process.send_signal(signal.SIGTERM)
        self._write_processes()

    def _environment(self, slot: int) -> dict[str, str]:
        env = dist.environment_alone()
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        elif self.at_once > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_once)))
        return env

    def _end(self, job: Job, follow: Follow) -> None:
        self.running.remove(job)
        self._write_processes()
        code, trial = job.process.returncode, job.trial
        if code == 0:
            write_text(trial.folder / "done.json", json.dumps({"key": trial.key}))
        elif not self.stopped:
            self.failures.append(Failure(trial, code, last_line(trial)))
        follow.ended(job, code)

    def _write_processes(self) -> None:
        pids = [os.getpid(), *(job.process.pid for job in self.running)]
        write_text(self.out / "processes", ", ".join(map(str, pids)))

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stopped = True
        for job in self.running:
            job.process.send_signal(signal.SIGTERM)


class Follow:
    """Lines on stderr: what has ended, what is running, and an estimate."""

    def __init__(self, total: int) -> None:
        self.done, self.total, self.begun = 0, total, time.monotonic()

    def ended(self, job: Job, code: int) -> None:
        """A run ended."""
        now = time.monotonic()
        self.done += 1
        left = (self.total - self.done) * (now - self.begun) / self.done
        how = f"done in {now - job.begun:.0f} s" if code == 0 else f"ended with code {code}"
        eta = f"  eta {left:.0f} s" if left else ""
        _say(f"{self.done}/{self.total}  {job.trial.arm}, seed {job.trial.seed}: {how}{eta}")

    def lines(self, running: Sequence[Job]) -> None:
        """How far the running ones are, by their logs."""
        for job in running:
            _say(f"     {job.trial.arm}, seed {job.trial.seed}: {last_line(job.trial)}")


def last_line(trial: Trial) -> str:
    """The last line of a trial's log."""
    log = trial.folder / "log.txt"
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].strip() if lines else "starts"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
