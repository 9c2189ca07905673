"""Walks through folders: links are followed without circles; files of systems are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from xray.errors import DataError
from xray.files import is_system_name


def walk(root: Path) -> Iterator[str]:
    """Yield the names of the files below a folder, relative to it, but for those of systems.

    Links to folders are followed, except links to their own folder or above it. Within a linked
    folder, a link to a folder that was visited before is not followed, so that the walk ends.
    """
    folders = [(str(root), "", False, False)]  # path, name, below a link, skipped if visited
    visited = set()
    while folders:
        path, name, linked, once = folders.pop()
        real = os.path.realpath(path)
        if once and real in visited:
            continue
        visited.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        for entry in entries:
            if is_system_name(entry.name) or loops(entry):
                continue
            if not is_folder(entry):
                yield name + entry.name
                continue
            link = entry.is_symlink()
            folders.append((entry.path, f"{name}{entry.name}/", linked or link, linked and link))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder or a link to one; asks the file system for links only."""
    if entry.is_symlink():
        return os.path.isdir(entry.path)  # entry.is_dir() raises for a link to itself
    return entry.is_dir()


def loops(entry: os.DirEntry[str]) -> bool:
    """Return True for a link that leads to its own folder or above it."""
    path = Path(entry.path)
    return (
        entry.is_symlink()
        and is_folder(entry)
        and path.parent.resolve().is_relative_to(path.resolve())
    )
