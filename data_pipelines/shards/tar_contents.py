"""Groups the members of a tar to samples, and lists the members that are left out.

A sample is the files of a tar that share a key. They usually follow each other. If all files of one
ending come first, they are joined by key; only files of one name make several samples.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.shards.tar_headers import DamagedTar, Member, compression, read_members
from xray.errors import DataError
from xray.files import SYSTEM_NAMES, is_system_name

Place = tuple[int, int]  # (offset, size) in bytes
# Causes for which a member is left out.
SYSTEM = "system or hidden file"
SAME_NAME = "file replaced by a later one of its name"
SPARSE, SPECIAL, BROKEN_LINK = "sparse file", "special file", "link to no file of the tar"
COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz|tzst)$")
LONGEST_CHAIN = 40  # links that lead to each other, as in Linux


@dataclass
class TarContents:
    """Samples of a tar: keys, and for each the places of its files by ending, in order."""

    keys: list[str] = field(default_factory=list)
    rows: list[dict[str, Place]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by cause


def is_system_file(name: str) -> bool:
    """Return True for hidden files and those that macOS, Windows and NAS add: `._a.jpg`, `@eaDir`.

    name: path with /; folders in it may be hidden.
    """
    *folders, base = name.split("/")
    return is_system_name(base) or any(folder in SYSTEM_NAMES for folder in folders)


def split_name(name: str) -> tuple[str, str]:
    """Split a file name by webdataset's rule: the key ends at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def read_tar(path: Path) -> TarContents:
    """Read the headers of a tar; raises DataError for a tar that is damaged or has no samples."""
    if path.is_dir():
        raise DataError(f"shard {path} is a folder, not a tar: re-create it or leave it out")
    length = path.stat().st_size
    if length == 0:
        raise DataError(f"shard {path} is empty (0 bytes): re-create it or leave it out")
    if (packed := compression(path)) is not None:
        raise DataError(compressed(str(path), *packed))
    grouping = _Grouping()
    try:
        with path.open("rb") as file:
            for member in read_members(file, length):
                grouping.add(member)
    except DamagedTar as error:
        keys = grouping.contents.keys
        last = f" after sample {keys[-1]!r}" if keys else ""
        raise DataError(
            f"shard {path} is truncated, damaged or not a tar ({error}){last}: re-create it or "
            "leave it out"
        ) from error
    contents = grouping.finished()
    if not contents.keys:
        raise DataError(f"shard {path} contains no samples: re-create it or leave it out")
    return contents


def is_compressed_tar(name: str) -> bool:
    """Return True for the names of compressed tars, such as `a.tar.gz` and `a.tgz`."""
    return bool(COMPRESSED_TAR.search(name.lower()))


def compressed(path: str, name: str = "", program: str = "the program that made it") -> str:
    """Return the message about a compressed tar."""
    how = f" with {name}" if name else ""
    return (
        f"shard {path} is compressed{how}: samples are read from their places in the tar, so "
        f"unpack it with {program} to a .tar"
    )


class _Grouping:
    """Groups members as they are read; links are resolved at the end."""

    def __init__(self) -> None:
        self.contents = TarContents()
        self._latest: dict[str, int] = {}  # key -> its last row in this archive
        self._archive = 0
        self._files: dict[str, Place] = {}
        self._links: dict[str, str] = {}
        self._unresolved: list[tuple[int, str, str, Place]] = []  # (row, ending, name, own place)

    def add(self, member: Member) -> None:
        """Add a member to its sample."""
        if member.archive != self._archive:  # another tar may use the same keys again
            self._archive, self._latest = member.archive, {}
        if member.kind == "folder":
            return
        if is_system_file(member.name):
            self.contents.left_out[SYSTEM].append(member.name)
        elif member.kind in ("sparse", "special"):
            cause = SPARSE if member.kind == "sparse" else SPECIAL
            self.contents.left_out[cause].append(member.name)
        else:
            place = (member.offset, member.size)
            row, ending = self._put(member.name, place)
            path = posixpath.normpath(member.name)
            if member.kind == "link":
                self._links[path] = member.target
                self._unresolved.append((row, ending, member.name, place))
            else:
                self._files[path] = place

    def _put(self, name: str, place: Place) -> tuple[int, str]:
        """Put a file into the sample of its key; return the sample's row and the file's ending."""
        key, ending = split_name(name)
        keys, rows = self.contents.keys, self.contents.rows
        row = self._latest.get(key, -1)
        if row >= 0 and ending in rows[row]:
            if row == len(rows) - 1:
                self.contents.left_out[SAME_NAME].append(name)
            else:
                row = -1
        if row < 0:
            keys.append(key)
            rows.append({})
            row = len(rows) - 1
        rows[row][ending] = place
        self._latest[key] = row
        return row, ending

    def finished(self) -> TarContents:
        """Give links the places of their files, and drop samples that have no file left."""
        contents = self.contents
        for row, ending, name, own in self._unresolved:
            if contents.rows[row][ending] != own:  # a later file of its name has replaced it
                continue
            place = self._followed(posixpath.normpath(name))
            if place is not None:
                contents.rows[row][ending] = place
            else:
                contents.left_out[BROKEN_LINK].append(name)
                del contents.rows[row][ending]
        if contents.left_out[BROKEN_LINK]:
            kept = [row for row, files in enumerate(contents.rows) if files]
            contents.keys = [contents.keys[row] for row in kept]
            contents.rows = [contents.rows[row] for row in kept]
        contents.left_out = {cause: names for cause, names in contents.left_out.items() if names}
        return contents

    def _followed(self, path: str) -> Place | None:
        """Return the place of the file that a link leads to, through other links."""
        for _ in range(LONGEST_CHAIN):
            path = self._links.get(path, "")
            if path in self._files:
                return self._files[path]
        return None
