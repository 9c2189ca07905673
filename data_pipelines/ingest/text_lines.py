"""Source of the lines of a .txt file; an empty line is a bad sample, so line numbers stay true."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.ingest.kind import Request
from data_pipelines.ingest.plain_files import SingleShard, manifest_of_one
from data_pipelines.shards.bad_sample import BadSample
from xray.errors import ConfigError, DataError
from xray.files import sha256_file

BLOCK = 1 << 24  # bytes of a text file that are looked through at a time


@dataclass(frozen=True)
class LineSource(SingleShard):
    """Texts, one per line; the key of a line is its number from 1."""

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.manifest.path(0))

    def keys(self) -> list[str]:
        """Return the numbers of the lines."""
        return [str(number) for number in range(1, len(self) + 1)]

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Offset of the end of each line, [N]."""
        return _line_ends(self.path)

    def read(
        self, shard: int, member: int, extensions: Sequence[str] | None = None
    ) -> dict[str, bytes]:
        """Read one line as the sample's `txt`; raises BadSample for an empty one."""
        start = int(self.ends[member - 1]) + 1 if member else 0
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(int(self.ends[member]) - start)
        try:
            text = line.decode("utf-8" if start else "utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadSample("not UTF-8", f"line {member + 1}") from error
        if not text:
            raise BadSample("empty line")
        return {"txt": text.encode()}


def _line_ends(path: Path) -> np.ndarray:
    found, at = [np.empty(0, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.append(at + np.flatnonzero(np.frombuffer(block, np.uint8) == 10))
            at += len(block)
    ends = np.concatenate(found)
    return ends if at == 0 or (len(ends) and ends[-1] == at - 1) else np.append(ends, at)


def open_lines(where: str, request: Request) -> LineSource:
    """Open a text file; raises DataError for an empty one, ConfigError for another modality."""
    if request.modality not in ("", "text"):
        raise ConfigError(f"{where} holds texts: leave out the modality {request.modality}")
    path = Path(where).absolute()
    count = len(_line_ends(path))
    if not count:
        raise DataError(f"{where} is empty")
    manifest = manifest_of_one(str(path), count, sha256_file(path))
    return LineSource(request.name, "text", request.animations, manifest, place=str(path))


def is_text(where: str) -> bool:
    """Return True if a path is a .txt file."""
    return os.path.splitext(where)[1].lower() == ".txt"
