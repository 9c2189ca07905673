"""Commands of xray in forked processes, and what an attempt to break one has shown."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.common.process_tree import descendants, left_of
from xray import processes

SECONDS = 120.0  # after which a command hangs
ORPHANS = 5.0  # seconds after which no process of a dead command is left
CODES = (0, 1, 2)  # of a command that ends as it should, with or without an error
ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "tests" / "support" / "tiny_recipe.yaml")


@dataclass(frozen=True)
class Outcome:
    """Result of one attempt: its kind, what did not hold ("" if all did), and faults injected."""

    kind: str
    fault: str = ""
    injected: int = 1


class Command:
    """Forked process that runs `xray ARGUMENTS`; everything is imported already, so it is fast.

    bytes_: no file may grow beyond this size, as on a full disk. env: further variables.
    """

    def __init__(
        self, log: Path, *arguments: object, bytes_: int = 0, env: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self._code: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid:
            return
        try:  # nothing may leave this block: the caller's code would go on twice
            os.setsid()
            processes.die_with(parent)
            os.environ |= env or {}
            if bytes_:
                fill_disk(bytes_)
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), stream)
            os._exit(_run(list(map(str, arguments))))
        finally:
            os._exit(1)  # such as no room in the log for a traceback

    def code(self) -> int | None:
        """Return the exit code, None while the command runs; the signal's, negative, if killed."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, seconds: float = SECONDS) -> int | None:
        """Wait for the end and return the exit code; None if the command hangs, it is killed."""
        deadline = time.monotonic() + seconds
        while (code := self.code()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if code is None:
            self.kill()
        return code

    def kill(self) -> str:
        """Kill the command; returns the processes that it has left behind, after ORPHANS."""
        below = descendants(self.pid)
        if self.code() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        left = left_of(below, ORPHANS)
        return f"{len(left)} processes left" if left else ""

    def fault(self, code: int | None, allowed: tuple[int, ...]) -> str:
        """Return what is wrong with an exit: a hang, a traceback or another code."""
        text = self.log.read_text("utf-8", errors="replace") if self.log.is_file() else ""
        last = (text.strip().splitlines() or [""])[-1][:160]
        if code is None:
            return f"hangs for {SECONDS:.0f} s: {last}"
        if "Traceback (most recent call last)" in text:
            return f"traceback: {last}"
        return "" if code in allowed else f"exit code {code}: {last}"


def fill_disk(bytes_: int) -> None:
    """Let no file of this process grow beyond a size, with an error that counts as a full disk."""
    from xray import files
    from xray.commands import common

    def full(error: BaseException) -> bool:
        too_large = getattr(error, "errno", None) == errno.EFBIG or "os error 27" in str(error)
        return too_large or known(error)

    known = files.disk_is_full
    files.disk_is_full = common.disk_is_full = full
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))


def _run(arguments: list[str]) -> int:
    from xray.commands.main import main

    sys.argv = ["xray", *arguments]
    code: object = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    return code if isinstance(code, int) else int(code is not None)


def train(
    out: Path, data: Path, *settings: str, bytes_: int = 0, env: Mapping[str, str] | None = None
) -> Command:
    """Start a run of the mae stage with a checkpoint at every step; settings may add stages."""
    given = (f"data.root={data}", f"out={out}", "train.save_every=1", "train.samples=72")
    log = out.with_name(f"{out.name}{(env or {}).get('RANK', '')}.log")
    stages = () if any(item.startswith("stages=") for item in settings) else ("stages=[mae]",)
    return Command(log, "run", RECIPE, *given, *stages, *settings, bytes_=bytes_, env=env)


def same_result(one: Path, two: Path) -> str:
    """Compare weights, metrics and evaluations of two runs; returns the first difference, or ""."""
    for folder in sorted(path.parent for path in one.glob("*/metrics.jsonl")):
        other = two / folder.name
        for file in sorted(folder.glob("artifact/*.safetensors")):
            own = other / "artifact" / file.name
            if not own.is_file():
                return f"no {folder.name}/artifact/{file.name}"
            if own.read_bytes() != file.read_bytes():
                return f"other weights in silence: {folder.name}/artifact/{file.name}"
        if _metrics(folder) != _metrics(other):
            return f"other metrics in silence: {folder.name}/metrics.jsonl"
    results = [path.read_bytes() for run in (one, two) if (path := run / "results.json").is_file()]
    return "other results in silence" if len(set(results)) > 1 else ""


def _metrics(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of a stage, without those that are measured and differ in every run."""
    measured = ("seconds", "samples/s", "tokens/s", "mfu", "memory/", "data/", "save/", "rank/")
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(measured)}
        for line in lines
    ]
