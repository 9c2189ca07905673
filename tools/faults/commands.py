"""Commands of xray in forked processes, and what an attempt to break one has shown."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tools.common.process_tree import descendants, left_of

SECONDS = 120.0  # after which a command hangs
ORPHANS = 5.0  # seconds after which no process of a dead command is left
ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "tests" / "support" / "tiny_recipe.yaml")


@dataclass(frozen=True)
class Outcome:
    """Result of one attempt: its kind, and what did not hold, "" if all did."""

    kind: str
    fault: str = ""


class Command:
    """Forked process that runs `xray ARGUMENTS`; everything is imported already, so it is fast.

    bytes_: no file may grow beyond this size, as on a full disk.
    """

    def __init__(self, log: Path, *arguments: object, bytes_: int = 0) -> None:
        self.log = log
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:  # nothing may leave this block: the caller's code would go on twice
            os.setsid()
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


def train(out: Path, data: Path, *settings: str, bytes_: int = 0) -> Command:
    """Start a run of the mae stage with a checkpoint at every step."""
    given = (f"data.root={data}", f"out={out}", "stages=[mae]", "train.save_every=1")
    log = out.with_name(f"{out.name}.log")
    return Command(log, "run", RECIPE, *given, "train.samples=72", *settings, bytes_=bytes_)


def same_result(one: Path, two: Path) -> str:
    """Compare the weights of two runs' artifacts; returns the difference, "" if there is none."""
    files = [path / "mae" / "artifact" / "backbone.safetensors" for path in (one, two)]
    if not files[1].is_file():
        return "no artifact"
    return "" if files[0].read_bytes() == files[1].read_bytes() else "other weights in silence"
