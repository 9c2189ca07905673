"""The start of a program in a fork of multiprocessing's fork server."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path


def begin(out: Path, err: Path) -> None:
    """Append this process's output to files, and let its own processes start in the usual way."""
    multiprocessing.set_start_method(None, force=True)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    # The fork server shares its objects with its children, and may have closed these streams.
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115
        for number in (1, 2)
    )
