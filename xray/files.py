"""Files: atomic writes, locks, hashes, permissions, UTF-8, and names inside a folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from xray.errors import ArtifactError, ConfigError


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give a file the permissions that open() sets, because safetensors would set 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def lock_folder(folder: Path, what: str, option: str = "out=") -> IO[str] | None:
    """Lock a folder until the returned file is closed or this process ends; None without locks.

    Forked children do not inherit the lock. Raises ConfigError if another process holds it;
    `what` says, for the message, how that process uses the folder.
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
    """Return True if a relative name stays inside its folder. Links are not followed."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def inside(folder: Path, name: str) -> Path:
    """Return folder / name; raises ArtifactError if it leads outside, also through a link."""
    if not is_inside(name) or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder} names a file outside of it: {name}")
    return folder / name


@contextmanager
def locked(path: Path, flags: int = 0) -> Iterator[IO[str]]:
    """Hold an exclusive lock on a file, shared by the processes of a host.

    flags: of flock; with LOCK_NB a lock that is held raises BlockingIOError. A child that inherits
    the file keeps the lock if this process is killed.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        try:
            yield file
        finally:  # closing alone would leave the lock to a child forked meanwhile
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def replacing(target: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder, and rename it to `target` at the end.

    An error leaves `target` as it was and removes the temporary. temporary: by default the name
    of `target` with .tmp, so that a killed writer leaves at most one; writers that run at the same
    time need one each, see `unique_temporary`.
    """
    temporary = temporary or target.with_name(f"{target.name}.tmp")
    _remove(temporary)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        _remove(temporary)


def unique_temporary(target: Path) -> Path:
    """Return a temporary name beside `target` that no other writer uses."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, temporary: Path | None = None) -> None:
    """Write a text file atomically."""
    with replacing(path, temporary) as name:
        name.write_text(text)


def printable(text: str) -> str:
    """Replace characters that UTF-8 cannot encode; file names in a tar may contain such bytes."""
    return text.encode("utf-8", "replace").decode()


def read_utf8(path: str, key: str) -> str:
    """Read a UTF-8 text file.

    Raises ConfigError naming the config key for a file that cannot be read or is not UTF-8.
    """
    try:
        return Path(path).expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{key}={path} is not UTF-8 (line {line}): convert it, e.g. with iconv -t UTF-8"
        ) from error


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder to disk: a later rename cannot precede its content."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync_file(file)


def sync_file(file: Path) -> None:
    """Flush a file to disk."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    state = hashlib.sha256()
    hash_file(path, state)
    return state.hexdigest()


def hash_file(path: Path, state: hashlib._Hash) -> None:
    """Feed a file's bytes to a hash."""
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            state.update(piece)
