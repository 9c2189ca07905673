"""Finds and removes the files that xray derived from shards, and those that killed writers left.

A side file in the hidden folder is known by its name; one beside the shards, where a user's own
files are, also by its content. Tars and other files are never removed.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.ingest.recode import TEMPORARY
from data_pipelines.shards.columns import open_columns
from data_pipelines.shards.side_files import HIDDEN, is_writable
from xray.errors import ConfigError
from xray.files import LEFTOVER, is_system_name, lock_folder, sole_writer


@dataclass(frozen=True)
class Kind:
    """Kind of derived files; costly: a command made them, so they are not made again by use."""

    name: str
    holds: str
    again: str  # what makes them again
    costly: bool = False


USE = "the next use"
KINDS = {
    "index": Kind("index", "offsets of the samples in a tar", USE),
    "manifest": Kind("manifest", "counts and digests of the tars", USE),
    "tags": Kind("tags", "counts of the tags", USE),
    "labels": Kind("labels", "tags of each sample", USE),
    "slots": Kind("slots", "samples of an epoch, by tags", USE),
    "hashes": Kind("hashes", "hashes of media", "data curate"),
    "texts": Kind("texts", "matches of the captions", "data curate"),
    "left": Kind("left", "samples left by filters", "data curate"),
    "kept": Kind("kept", "keep-lists", "data curate", costly=True),
    "uids": Kind("uids", "samples of a list of uids", USE),
    "captioned": Kind("captioned", "samples with captions", USE),
    "teacher": Kind("teacher", "tags given by a model", "data pseudo-tags", costly=True),
    "embeddings": Kind("embeddings", "embeddings by a model", "data embeddings", costly=True),
    "scores": Kind("scores", "scores by a model", "data scores", costly=True),
    "caption-ids": Kind("caption-ids", "numbers of captions", "data text-features", costly=True),
    "text-features": Kind(
        "text-features", "vectors of captions by an LLM", "data text-features", costly=True
    ),
    "unfinished": Kind("unfinished", "left by interrupted writers", "not needed"),
}
HASHED = [name for name in KINDS if name not in ("index", "manifest", "unfinished")]
SIDE_FILE = re.compile(
    r"(?:.+\.tar\.(?P<index>index)|shards(?:-[0-9a-f]{8})?\.(?P<manifest>manifest)"
    rf"|(?:.+\.tar|shards-[0-9a-f]{{8}})\.(?P<hashed>{'|'.join(HASHED)})(?:-[0-9a-f-]{{8,}}"
    r"(?:-counts)?)?)$"
)
LOCK = re.compile(r"process \d+ on \S+\n")


@dataclass(frozen=True)
class Derived:
    """A file that xray derived from shards, or that a killed writer of xray left."""

    path: Path
    kind: Kind
    size: int


@dataclass(frozen=True)
class Findings:
    """Derived files of a folder. unknown: beside the shards, with such a name but other content."""

    derived: list[Derived]
    unknown: list[Path]
    read_only: list[Path]  # folders of shards that cannot be written


def find_derived(folder: Path) -> Findings:
    """Find the derived files in a folder and the folders below it; links are not followed.

    Raises ConfigError if it is no folder, and if another process packs into it or curates there.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give the folder of the shards")
    found = Findings([], [], [])
    for where, folders, names in os.walk(folder):
        here = Path(where)
        hidden = here.name == HIDDEN
        below = [name for name in folders if name == HIDDEN or not is_system_name(name)]
        folders[:] = [] if hidden else sorted(below)
        if not hidden and any(n.endswith(".tar") for n in names) and not is_writable(here):
            found.read_only.append(here)
        for name in sorted(names):
            _add(found, here / name, hidden)
    return found


def _add(found: Findings, path: Path, hidden: bool) -> None:
    """Add a file to the findings, if it is a derived one."""
    if path.is_symlink() or not path.is_file():
        return
    kind = _kind(path, hidden)
    if kind is None:
        return
    if not hidden and kind.name != "unfinished" and not _is_table(path):
        found.unknown.append(path)
    else:
        found.derived.append(Derived(path, kind, path.stat().st_size))


def _kind(path: Path, hidden: bool) -> Kind | None:
    """Return the kind of a derived file by its name, None for any other file."""
    name = path.name
    if match := SIDE_FILE.fullmatch(name):
        return KINDS[match["index"] or match["manifest"] or match["hashed"]]
    base = LEFTOVER.sub("", name)
    if base != name and (hidden or SIDE_FILE.fullmatch(base)):
        return KINDS["unfinished"]
    if not hidden and (name.startswith(TEMPORARY) or (name == "lock" and _is_our_lock(path))):
        return KINDS["unfinished"]
    return None


def _is_our_lock(path: Path) -> bool:
    """Return True for the lock file of a packing, a split or a curation.

    Raises ConfigError if its process holds it.
    """
    records = ("pack.json", "split.json", "curation.json")
    if not is_writable(path.parent) or not _is_lock(path):
        return False
    if not any((path.parent / name).is_file() for name in records):
        return False
    if (file := lock_folder(path.parent, "written to", "folder")) is not None:
        file.close()
    return True


def _is_table(path: Path) -> bool:
    """Return True if a file is a table of columns, as all side files are."""
    try:
        open_columns(path)
    except (OSError, ValueError):
        return False
    return True


def remove(derived: Sequence[Derived]) -> None:
    """Remove derived files, and then the hidden folders that are empty.

    Raises ConfigError if another process of this host has one of them open, writes side files, or
    packs or curates to one of the folders; the folders before that one are cleaned then.
    """
    _check_unused({os.path.realpath(item.path) for item in derived})
    for folder in dict.fromkeys(item.path.parent for item in derived):
        home = folder.parent if folder.name == HIDDEN else folder
        with _no_writer(folder), _sole_user(home):
            for item in derived:
                if item.path.parent == folder and item.path.name != "lock":  # sole_writer's own
                    item.path.unlink(missing_ok=True)
        if folder.name == HIDDEN and not folder.is_symlink():
            with suppress(OSError):  # other files are left in it
                folder.rmdir()


def _check_unused(paths: set[str]) -> None:
    """Raise ConfigError if another process has one of the files memory-mapped."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        lines: list[str] = []
        with suppress(OSError):  # of another user, or ended
            lines = maps.read_text("utf-8", "surrogateescape").splitlines()
        used = paths & {line[line.index("/") :] for line in lines if "/" in line}
        if used and maps.parent.name != str(os.getpid()):
            raise ConfigError(
                f"process {maps.parent.name} reads {min(used)}: wait for it or end it first"
            )


def _sole_user(folder: Path) -> AbstractContextManager[None]:
    """Lock a folder of shards, as writers of shards do; a user's file `lock` stays as it is."""
    path = folder / "lock"
    mine = path.exists() and (not path.is_file() or not _is_lock(path))
    return nullcontext() if mine else sole_writer(folder, "folder")


def _is_lock(path: Path) -> bool:
    size = path.stat().st_size
    return size < 1000 and bool(LOCK.fullmatch(path.read_text("utf-8", "replace")))


@contextmanager
def _no_writer(folder: Path) -> Iterator[None]:
    """Keep writers of side files out of a folder (`replacing_shared`); raises ConfigError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process writes side files to {folder}: wait for it or end it first"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
