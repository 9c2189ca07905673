"""Runs a section of `gpu_check` in a child process, which can be killed with all its own ones."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.common import forked
from tools.gpu.findings import Finding, Scale

OURS = ("xray", "stages", "data_pipelines", "tools", "configs")
# Imports that most sections need. A child imports them while an earlier section runs.
PRELOAD = ["stages.clip", "stages.hashtag", "stages.text", "xray.training.accumulation"]
GRACE = 0.9  # share of a section's limit after which it begins no further measurement
GRACE_SECONDS = 5.0  # for a process to end by itself


class Child:
    """Process of one section, started early so that it can import while another one works."""

    def __init__(self, section: str, device: str, toy: bool, log: Path) -> None:
        # A forked server imports once, but CUDA does not work in a fork of a process that used it.
        context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            context.set_forkserver_preload(PRELOAD)
        self.section = section
        self.pipe, other = context.Pipe()
        arguments = section, device, toy, str(log), other
        self.process = context.Process(target=_begin, args=arguments)
        self.process.start()
        other.close()

    def findings(self, limit: float) -> Iterator[Finding]:
        """Let the section work for `limit` seconds at most, and yield its findings.

        Raises TimeoutError at the limit, and CrashError if the section raises or its process ends.
        """
        end = time.monotonic() + limit
        self.pipe.send(GRACE * limit)
        while True:
            if not self.pipe.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"killed after {limit:.0f} s")
            try:
                received = self.pipe.recv()
            except EOFError:
                self.process.join(GRACE_SECONDS)
                raise CrashError(f"the process ended with {self.process.exitcode}") from None
            if received is None:
                self.process.join(GRACE_SECONDS)
                return
            if isinstance(received, BaseException):
                raise received
            yield received

    def end(self) -> None:
        """Kill the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.killpg(self.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self.process.kill()
        self.process.join()
        self.pipe.close()


class CrashError(Exception):
    """Error that ended a section."""


class MissingPackageError(Exception):
    """Absence of a package that a section needs."""


def _begin(section: str, device: str, toy: bool, log: str, pipe: Connection) -> None:
    """Prepare a new process for a section, and work."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    forked.begin(Path(log), Path(log))
    with contextlib.suppress(ImportError):  # the section itself reports what it lacks
        for name in PRELOAD:
            importlib.import_module(name)
    with contextlib.suppress(EOFError):  # the parent ended
        work(section, device, toy, pipe)


def work(section: str, device: str, toy: bool, pipe: Any) -> None:
    """Run a section: receive its seconds, then send findings and at last None or an error."""
    seconds = pipe.recv()
    print(f"\n=== {section}", flush=True)
    try:
        for finding in run(section, device, Scale(toy, time.monotonic() + seconds)):
            print(finding, flush=True)
            pipe.send(finding)
        pipe.send(None)
    except ModuleNotFoundError as error:
        traceback.print_exc()
        name = error.name or str(error)
        known = name.split(".")[0] in OURS
        pipe.send(
            CrashError(str(error)) if known else MissingPackageError(f"needs the package {name}")
        )
    except BaseException as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        text = " ".join(str(error).split())[:300]
        pipe.send(CrashError(f"{type(error).__name__} at {place}: {text}"))


def run(section: str, device: str, scale: Scale) -> Iterator[Finding]:
    """Run a section in this process, on a device that is chosen as in the trainer."""
    from xray.dist import choose_device
    from xray.training.deepspeed_setup import init_distributed

    chosen = choose_device(device)
    init_distributed(chosen)
    yield from importlib.import_module(f"tools.gpu.{section}").run(chosen, scale)
