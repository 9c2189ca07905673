"""Execution of an ablation's runs as processes, several at a time if there are several GPUs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from xray import dist, processes
from xray.ablations.trials import DONE, RESULTS, Trial
from xray.errors import ConfigError, Preempted
from xray.files import locked, write_text
from xray.progress import LINE_SECONDS
from xray.urls import environment

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_SECONDS = 0.2


@dataclass
class Failure:
    """Trial whose run failed, with its exit code and the last line of its log."""

    trial: Trial
    code: int
    line: str


@dataclass
class Job:
    """Running trial and its process; `slot` numbers the concurrent jobs."""

    trial: Trial
    process: subprocess.Popen[bytes]
    slot: int
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.trial.arm}, seed {self.trial.seed}"


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[IO[str]]:
    """Lock an ablation's folder and yield the lock file.

    The runs inherit the lock: if this process is killed, the folder stays locked until they have
    ended, too. Raises ConfigError if another process holds the lock.
    """
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(locked(out / "lock", fcntl.LOCK_NB))
        except BlockingIOError:
            pids = (out / "processes").read_text("utf-8") if (out / "processes").is_file() else ""
            raise ConfigError(
                f"out={out} is in use by another xray ablate or by runs that it started "
                f"(processes {pids or 'unknown'}): wait for them, stop them, or set another out"
            ) from None
        yield file


def visible_gpus() -> list[str]:
    """Return the names of this machine's GPUs as CUDA_VISIBLE_DEVICES has them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


class Jobs:
    """Scheduler of trials; two trials with a common unfinished stage run never run together.

    at_once: number of concurrent trials; 0 = one per GPU, or one without GPUs. lock: the lock file
    of the ablation's folder `out`, inherited by the trials' processes.
    """

    def __init__(self, out: Path, at_once: int, lock: IO[Any]) -> None:
        self.out, self.lock = out, lock
        self.gpus = visible_gpus()
        self.at_once = at_once or max(1, len(self.gpus))
        self.running: list[Job] = []
        self.failures: list[Failure] = []
        self.ended, self.total, self.started = 0, 0, time.monotonic()
        self.stopped = False

    def run(self, trials: Sequence[Trial]) -> list[Failure]:
        """Run all unfinished trials and return those that failed.

        After a signal, all running trials save a checkpoint; then Preempted is raised.
        """
        waiting = [trial for trial in trials if not trial.finished()]
        self.total, self.started = len(waiting), time.monotonic()
        last_printed = self.started
        previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            while self.running or (waiting and not self.stopped):
                while not self.stopped and (chosen := self._next(waiting)) is not None:
                    waiting.remove(chosen)
                    self._start(chosen)
                time.sleep(POLL_SECONDS)
                for job in [job for job in self.running if job.process.poll() is not None]:
                    self._end(job)
                if time.monotonic() - last_printed > LINE_SECONDS:
                    last_printed = time.monotonic()
                    for job in self.running:
                        _print(f"     {job}: {last_line(job.trial)}")
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stopped:
            raise Preempted("stopped by a signal; run the same command again to continue")
        return self.failures

    def _next(self, waiting: Sequence[Trial]) -> Trial | None:
        """Return the first trial that may start: no running trial trains one of its stage runs."""
        if len(self.running) >= self.at_once:
            return None
        taken = {name for job in self.running for name in job.trial.missing()}
        return next((t for t in waiting if not taken & set(t.missing())), None)

    def _start(self, trial: Trial) -> None:
        slot = min(set(range(self.at_once)) - {job.slot for job in self.running})
        for name in (RESULTS, DONE):  # from other settings or an interrupted run
            (trial.folder / name).unlink(missing_ok=True)
        recipe = str(trial.folder / "recipe.yaml")
        with (trial.folder / "log.txt").open("ab") as log:
            process = processes.start(
                [sys.executable, "-m", "xray", "run", recipe],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment(slot),
                pass_fds=[self.lock.fileno()],
            )
        self.running.append(Job(trial, process, slot))
        if self.stopped:  # the signal arrived before the process was in self.running
            process.send_signal(signal.SIGTERM)
        self._write_processes()

    def _environment(self, slot: int) -> dict[str, str]:
        env = dist.environment_alone() | environment()
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        elif self.at_once > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_once)))
        return env

    def _end(self, job: Job) -> None:
        """Record that a trial ended, and print its duration or exit code and the time left."""
        self.running.remove(job)
        self._write_processes()
        code, trial = job.process.returncode, job.trial
        if code == 0:
            trial.finish()
        elif not self.stopped:
            self.failures.append(Failure(trial, code, last_line(trial)))
        now = time.monotonic()
        self.ended += 1
        left = (self.total - self.ended) * (now - self.started) / self.ended
        failed = "stopped" if self.stopped else f"failed with code {code}"
        result = f"done in {now - job.started:.0f} s" if code == 0 else failed
        eta = f"  eta {left:.0f} s" if left and not self.stopped else ""
        _print(f"{self.ended}/{self.total}  {job}: {result}{eta}")

    def _write_processes(self) -> None:
        pids = [os.getpid(), *(job.process.pid for job in self.running)]
        write_text(self.out / "processes", ", ".join(map(str, pids)))

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stopped = True
        for job in self.running:
            job.process.send_signal(signal.SIGTERM)


def last_line(trial: Trial) -> str:
    """Return the last line of a trial's log."""
    log = trial.folder / "log.txt"
    lines = log.read_text("utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].strip() if lines else "starting"


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
