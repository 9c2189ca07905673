"""Files: atomic writes, locks, hashes, permissions, text, and names inside a folder."""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tokenize import TokenError
from typing import IO
from zipfile import BadZipFile

from xray.errors import ArtifactError, ConfigError, DataError, closest

# errors of numpy for a damaged .npy, whose header it parses as Python, or for a damaged archive
NPY_DAMAGE = (ValueError, LookupError, TypeError, SyntaxError, EOFError, TokenError, BadZipFile)


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
    path = folder / "lock"
    file = path.open("a+", encoding="utf-8")
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
    if not _is_at(file, path):  # its last holder has removed it
        file.close()
        return lock_folder(folder, what, option)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _is_at(file: IO[str], path: Path) -> bool:
    """Return True if an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def sole_writer(folder: Path, option: str) -> Iterator[None]:
    """Make a folder and lock it for the block (`lock_folder`); its lock file is removed after it.

    Raises ConfigError, which names the option of the folder, if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = lock_folder(folder, "written to", option)
    try:
        yield
    finally:
        (folder / "lock").unlink(missing_ok=True)
        if file is not None:
            file.close()


def is_inside(name: str) -> bool:
    """Return True if a relative name stays inside its folder. Links are not followed."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def inside(folder: Path, name: str) -> Path:
    """Return folder / name; raises ArtifactError if it leads outside, also through a link."""
    if not is_inside(name) or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder} names a file outside of it: {name}")
    return folder / name


def make_folder(folder: Path, what: str, setting: str) -> None:
    """Create a folder for derived files; raises DataError naming the setting to change."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{what} {folder} cannot be created: {error.strerror}; set {setting} to a folder you "
            "can write to"
        ) from error


@contextmanager
def locked(path: Path, flags: int = 0) -> Iterator[IO[str]]:
    """Hold an exclusive lock on a file, shared by the processes of a host.

    flags: of flock; with LOCK_NB a lock that is held raises BlockingIOError. A child that inherits
    the file keeps the lock if this process is killed.
    """
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        try:
            yield file
        finally:  # closing alone would leave the lock to a child forked meanwhile
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def replacing(target: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder, and rename it to `target` at the end.

    An error leaves `target` as it was and removes the temporary; that of a full disk names
    `target`. temporary: by default the name of `target` with .tmp, so that a killed writer leaves
    at most one; for writers that run at the same time, see `replacing_shared`.
    """
    temporary = temporary or target.with_name(f"{target.name}.tmp")
    _remove(temporary)
    try:
        with naming_full_disk(target):
            yield temporary
            os.replace(temporary, target)
    finally:
        _remove(temporary)


@contextmanager
def replacing_shared(target: Path) -> Iterator[Path]:
    """Yield a temporary path like `replacing`, but one that no other writer uses.

    A writer holds a shared lock on the folder. Whoever gets it alone removes the temporaries there:
    their writers were killed.
    """
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, or another writer is at work
            if (os.getpid(), target.parent) not in _swept:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in target.parent.glob("*.tmp"):
                    if LEFTOVER.search(path.name):
                        path.unlink(missing_ok=True)
                _swept.add((os.getpid(), target.parent))
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_SH)
        with replacing(target, target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")) as path:
            yield path
    finally:
        os.close(folder)


LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_swept: set[tuple[int, Path]] = set()  # (process, folder) whose leftovers are removed


@contextmanager
def making(target: Path) -> Iterator[None]:
    """Let one process of this host at a time make a file or folder; the others wait.

    Look in the block if it exists already. The lock is a hidden file beside it, removed at the end.
    A file system without locks has no effect.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    while True:
        with path.open("a", encoding="utf-8") as file:
            _wait_for_lock(file, target)
            if not _is_at(file, path):  # its last holder has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _wait_for_lock(file: IO[str], target: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"xray: waiting for a process that makes {target}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def disk_is_full(error: BaseException) -> bool:
    """Return True for the error of a full disk or quota, in the types of all libraries."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    texts = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")
    return any(text in str(error) for text in texts)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Name a path in the error of a full disk, which has no name or another type without it."""
    try:
        yield
    except Exception as error:
        if not disk_is_full(error) or (isinstance(error, OSError) and error.filename):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def write_in_place(path: Path, text: str) -> None:
    """Write a text file that may also be a link or a device; a full disk's error names it."""
    with naming_full_disk(path):
        path.write_text(text, "utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, temporary: Path | None = None) -> None:
    """Write a text file atomically."""
    with replacing(path, temporary) as name:
        name.write_text(text, "utf-8")


def printable(text: str) -> str:
    """Replace characters that UTF-8 cannot encode; file names in a tar may contain such bytes."""
    return text.encode("utf-8", "replace").decode()


MARKS = {  # byte-order mark -> encoding; UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
CONVERT = "convert it, e.g. with iconv -f ENCODING -t UTF-8"


def encoding_of(start: bytes) -> tuple[str, int]:
    """Return (encoding, length of the byte-order mark) of a text; without a mark it is UTF-8."""
    mark = next((mark for mark in MARKS if start.startswith(mark)), b"")
    return MARKS.get(mark, "utf-8"), len(mark)


def decode_text(data: bytes) -> str:
    """Decode a text: UTF-8, or UTF-16 or UTF-32 with a byte-order mark. Line ends do not change.

    Raises ValueError for other bytes and for NULs, which UTF-16 without a mark has; its message
    continues a sentence that begins with the name of the file.
    """
    encoding, mark = encoding_of(data)
    try:
        text = data[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].decode(encoding, "replace").count("\n") + 1
        name = "UTF-8" if encoding == "utf-8" else f"the {encoding.upper()} that its start promises"
        raise ValueError(f"is not {name} (line {line}): {CONVERT}") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"is not UTF-8: it has NUL characters (line {line}): {CONVERT}")
    return text


def lines_of(text: str) -> list[str]:
    r"""Split a text at \n and \r\n only; str.splitlines also splits at U+2028, NEL, VT and more."""
    return text.replace("\r\n", "\n").split("\n")


def read_text(path: str, key: str) -> str:
    """Read a text file that a config key names.

    Raises ConfigError naming the key for a file that cannot be read or decoded (`decode_text`).
    """
    try:
        return decode_text(Path(os.path.expanduser(path)).read_bytes())
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{key}={path} {error}") from error


SYSTEM_NAMES = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


def nearest_path(path: str | Path) -> str:
    """Return a hint such as "; did you mean 'runs/small'?" for a path that is not there, or ""."""
    there = Path(path)
    try:
        if there.exists():  # as something else, such as a folder
            return ""
        while not there.parent.is_dir() and there != there.parent:
            there = there.parent
        match = closest(there.name, (entry.name for entry in there.parent.iterdir()))
    except OSError:
        return ""
    return f"; did you mean '{there.parent / match}'?" if match else ""


def is_system_name(name: str) -> bool:
    """Return True for the name of a file or folder that is hidden or that a system adds to data."""
    return name.startswith(".") or name in SYSTEM_NAMES


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
