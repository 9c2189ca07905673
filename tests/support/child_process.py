"""Helpers that run Python programs in child processes: an xray command, or two ranks.

The programs are forks of a server that has done the heavy imports, which take longer than most of
the programs. Tests of how a program starts begin a Python of their own.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from tools.common import forked

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
RECIPE = str(SUPPORT / "tiny_recipe.yaml")
PATHS = f"{SUPPORT}{os.pathsep}{ROOT}"
PRELOAD = (
    *("stages.clip", "stages.hashtag", "stages.mae", "stages.text", "transformers"),
    *("xray.training.trainer", "xray.evaluation.evaluator", "xray.recipes.report"),
)


class Child:
    """Program of `python ARGUMENTS`, which are `-m MODULE ...` or `SCRIPT ...`, and its output."""

    def __init__(self, arguments: tuple[str, ...], **environment: str) -> None:
        self.arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        self._files = [f"{self._folder.name}/{name}" for name in ("stdout", "stderr")]
        for file in self._files:  # there also if the process is killed before it opens them
            Path(file).touch()
        # models this small gain nothing from more threads
        environment = clean_environment(OMP_NUM_THREADS="1", **environment)
        given = arguments, environment, os.getcwd(), self._files
        self.process = fork_server().Process(target=_run, args=given)
        self.process.start()

    def result(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end, and return the exit code and the output."""
        self.process.join()
        out, err = (Path(file).read_text("utf-8") for file in self._files)
        self._folder.cleanup()
        code: Any = self.process.exitcode
        return subprocess.CompletedProcess(self.arguments, code, out, err)


@functools.cache
def fork_server() -> Any:
    """Start the server of this process, and return the context of its children."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD])
    # The number of threads and the paths are read at the start.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", PATHS)
        forkserver.ensure_running()
    return context


def _run(
    arguments: tuple[str, ...], environment: dict[str, str], folder: str, files: list[str]
) -> None:
    """Run a program in a child of the server as its main module."""
    gc.freeze()  # as in conftest.py
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    forked.begin(*map(Path, files))
    module = arguments[0] == "-m"
    sys.argv = [*arguments[module:]]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program."""
    return Child(arguments).result()


def xray(*arguments: str, killed_at: str = "") -> subprocess.CompletedProcess[str]:
    """Run an xray command; killed_at: moment of a kill, see kill_helper.py."""
    command = ["-m", "xray"] if not killed_at else [str(SUPPORT / "kill_helper.py"), killed_at]
    return python(*command, *arguments)


def torchrun(*arguments: str) -> str:
    """Run two ranks as torchrun does; fail on an exit code, return what they write to stderr."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = str(port)
    ranks = [Child(arguments, RANK=rank, LOCAL_RANK=rank, **group) for rank in ("0", "1")]
    running = [rank.process for rank in ranks]
    while running:
        ended = wait([process.sentinel for process in running])
        running = [process for process in running if process.sentinel not in ended]
        if any(rank.process.exitcode for rank in ranks):  # the other one would wait for it
            for process in running:
                process.kill()
    results = [rank.result() for rank in ranks]
    written = "".join(result.stderr for result in results)
    assert not any(result.returncode for result in results), written[-3000:]
    return written


def clean_environment(**more: str) -> dict[str, str]:
    """Copy the environment without the process group that tests here may have joined."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | more
