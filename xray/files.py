"""Files as other people can read them, and as a list of them may name them."""

from __future__ import annotations

import fcntl
import hashlib
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


@contextmanager
def locked(path: Path, flags: int = 0) -> Iterator[None]:
    """Hold a lock that the processes of a host share; `flags` of flock."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        try:
            yield
        finally:  # closing alone would leave the lock to a child forked meanwhile
            fcntl.flock(file, fcntl.LOCK_UN)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def sync_tree(folder: Path) -> None:
    """fsync every file below a folder, so that a rename that follows cannot outrun its content."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        state = hashlib.sha256()
        while piece := file.read(1 << 22):
            state.update(piece)
    return state.hexdigest()
