"""`make install` takes torch's CPU build only where there is no GPU and its index answers."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_code import ROOT

NOBODY = "http://127.0.0.1:9"
# Stands for the environment's python: logs each pip command, and runs other commands.
PYTHON = f"""#!/bin/sh
test "$1" = -m || exec {sys.executable} "$@"
echo "$@" >> pip.log
case "$*" in *"$REFUSED"*) exit 1;; esac
"""


@pytest.fixture
def index() -> Iterator[str]:
    """URL of a server that answers."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def installed(folder: Path, url: str, gpu: str, refused: str = "nothing") -> list[str]:
    """The pip commands of `make install`."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    command = ["make", "install", f"CPU_INDEX={url}", f"GPU={gpu}"]
    env = {"PATH": "/usr/bin:/bin", "REFUSED": refused}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "pip.log").read_text().splitlines()


@pytest.mark.parametrize(("answers", "has_gpu"), [(True, False), (True, True), (False, False)])
def test_the_cpu_build_is_installed_first(
    tmp_path: Path, index: str, answers: bool, has_gpu: bool
) -> None:
    gpu = str(tmp_path if has_gpu else tmp_path / "none")
    *first, last = installed(tmp_path, index if answers else NOBODY, gpu)
    assert last.endswith("-e .[dev,docs]")
    assert bool(first) == (answers and not has_gpu)
    assert all(line.endswith(f"torch torchvision --index-url {index}") for line in first)


def test_pypi_follows_if_the_cpu_build_cannot_be_installed(tmp_path: Path, index: str) -> None:
    first, last = installed(tmp_path, index, str(tmp_path / "none"), refused="torchvision")
    assert "--index-url" in first and last.endswith("-e .[dev,docs]")
