"""Files as other people can read them, and as a list of them may name them."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from xray.errors import ArtifactError, ConfigError


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """A file written inside gets the permissions that open() gives; safetensors' are 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def hold(folder: Path, what: str, option: str = "out=") -> IO[str] | None:
    """Be the only process that works in a folder, until the file is closed or the process ends.

    A process that is forked off holds nothing of it. None where the file system has no locks.
    Raises ConfigError where another process holds it.
    """
    file = (folder / "lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        who = file.read().strip() or "unknown"
        file.close()
        raise ConfigError(
            f"{folder} is {what} by another process ({who}): wait for it or end it, or choose "
            f"another {option}"
        ) from None
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def is_inside(name: str) -> bool:
    """Whether a name that a file gives stays in that file's folder, whatever links lie there."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def inside(folder: Path, name: str) -> Path:
    """The file of a name below a folder; raises ArtifactError where that is outside, by a link."""
    if not is_inside(name) or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder} names a file outside of it: {name}")
    return folder / name
