"""Processes that end with this one, even if it is killed or they are frozen (SIGSTOP).

The kernel kills a child when the *thread* that started it ends (PR_SET_PDEATHSIG). Commands and
pools are therefore started by one thread, which lives as long as the process. A forked process
belongs to the thread that forked it, so that thread must outlive it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import ForkProcess, SpawnContext, SpawnProcess
from typing import Any

PR_SET_PDEATHSIG = 1
# Runs a command in the place of this small program, which has tied itself to its parent: the
# setting outlives exec.
TIE = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends; exit if it has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a command that ends with this process; options: of Popen."""
    tie = [sys.executable, "-I", "-S", "-c", TIE, str(os.getpid())]
    return _from_lasting_thread(lambda: subprocess.Popen([*tie, *command], **options))


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its output and exit code."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(command, text=True, errors="replace", **pipes) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def process_pool(
    workers: int, initializer: Callable[..., None] | None = None, given: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of spawned processes; at the end of the block they are killed.

    Take all results inside the block. given: arguments of the initializer. The processes ignore
    Ctrl-C, so an interrupt reaches only this process and ends the block.
    """
    context = _PoolContext()
    with ProcessPoolExecutor(workers, context, initializer, given) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in context.started:  # one that is frozen or busy would not end by itself
                process.kill()


def _from_lasting_thread(call: Callable[[], Any]) -> Any:
    return _starter(os.getpid()).submit(call).result()


@functools.lru_cache(maxsize=1)
def _starter(pid: int) -> ThreadPoolExecutor:
    """Return the thread that starts processes; a forked process gets a new one."""
    return ThreadPoolExecutor(1, "starter")


class _PoolProcess(SpawnProcess):
    """Spawned process that is tied to its parent before it imports what it runs."""

    def start(self) -> None:
        """Start the process."""
        with _uninterrupted():
            _from_lasting_thread(super().start)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (os.getpid(),), self.__dict__


def _unpickled(parent: int) -> _PoolProcess:
    """Tie this new process to its parent, and return the object that describes it."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _PoolProcess.__new__(_PoolProcess)


class _PoolContext(SpawnContext):
    """Context of one pool; `started` are its processes."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *given: Any, **named: Any) -> SpawnProcess:  # type: ignore[override] # noqa: N802
        """Make a process of the pool."""
        self.started.append(_PoolProcess(*given, **named))
        return self.started[-1]


class ForkedProcess(ForkProcess):
    """Forked process that ends with the thread that forked it."""

    def run(self) -> None:
        """Run the process."""
        assert self._parent_pid is not None  # type: ignore[attr-defined]
        die_with(self._parent_pid)  # type: ignore[attr-defined]
        super().run()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let processes that are spawned in this block ignore Ctrl-C from their first moment.

    A process that is interrupted during its imports would print a traceback.
    """
    # Python allows only the main thread to set signal handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
