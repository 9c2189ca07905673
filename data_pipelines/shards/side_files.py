"""Paths of side files: indexes, manifests and tables that xray derives from shards.

New ones are written to one hidden folder beside the shards, `.xray`; if it cannot be written, to
the user's cache. Versions before it wrote them beside the shards: those are read, and written
again, where they are.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from xray.files import make_folder

HIDDEN = ".xray"


def hidden_path(beside: Path) -> Path:
    """Return the path in the hidden folder of a file that would be beside the shards."""
    return beside.parent / HIDDEN / beside.name


def possible_paths(beside: Path) -> list[Path]:
    """Return the paths where a side file may be, the one to write it to last.

    beside: its path beside the shards, where versions before the hidden folder wrote it.
    """
    hidden, write = hidden_path(beside), beside
    if not is_writable(beside.parent):
        path = str(beside.resolve()).encode("utf-8", "surrogateescape")
        write = user_cache("index") / hashlib.sha256(path).hexdigest()[:32]
    elif not beside.is_file():
        write = hidden
        if hidden.parent.is_dir() and not is_writable(hidden.parent):
            write = beside
    return [path for path in (beside, hidden) if path != write] + [write]


def path_to_write(beside: Path) -> Path:
    """Return the path to write a side file to."""
    return possible_paths(beside)[-1]


def make_side_folder(folder: Path) -> None:
    """Create the folder of a side file; raises DataError if it cannot be created.

    The hidden folder gets the permissions of the shards' folder, which a group may share.
    """
    if not folder.is_dir():
        make_folder(folder, "the folder", "XDG_CACHE_HOME")
        if folder.name == HIDDEN:
            with suppress(OSError):
                folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))


def is_writable(folder: Path) -> bool:
    """Return True if files can be created in a folder; root may, unless its owner may not."""
    return bool(folder.stat().st_mode & stat.S_IWUSR) and os.access(folder, os.W_OK)


def user_cache(name: str) -> Path:
    """Return the path of a folder in the user's cache; who writes into it creates it."""
    try:
        usual = Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        usual = Path("/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "xray" / name
