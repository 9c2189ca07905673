"""Writer of tars whose bytes depend only on their samples."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from xray.errors import DataError


def flat_name(shard: str) -> str:
    """Return the file name of a rewritten shard: those of subfolders are written to one folder."""
    return shard.replace("/", "_")


def check_flat_names(shards: Iterable[str]) -> None:
    """Raise DataError for two shards that would be written to one file."""
    taken: dict[str, str] = {}
    for shard in shards:
        name = flat_name(shard)
        if name in taken:
            raise DataError(
                f"shards {taken[name]} and {shard} would both be written to {name}: rename one, "
                "and name each shard once"
            )
        taken[name] = shard


@contextmanager
def new_tar(path: Path) -> Iterator[Callable[[str, Mapping[str, bytes]], None]]:
    """Write a tar; yields the function that adds the files of a sample, (key, ending -> bytes).

    The bytes of the tar depend only on the samples, and are on disk when the block ends.
    """
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:

            def add(key: str, files: Mapping[str, bytes]) -> None:
                for ending, content in sorted(files.items()):
                    member = tarfile.TarInfo(f"{key}.{ending}")  # its time is 0
                    member.size, member.mode = len(content), 0o444
                    archive.addfile(member, io.BytesIO(content))

            yield add
        file.flush()
        os.fsync(file.fileno())
