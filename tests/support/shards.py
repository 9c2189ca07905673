"""Shards and sources for tests."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from data_pipelines.shards.columns import open_columns, pack_texts
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.source import Source


class Clock:
    """Stands for `time` in a module under test: sleeping moves it, and nothing else."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def jpeg(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 20)) -> bytes:
    """Encode a JPEG of one colour; size: (width, height)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="JPEG")
    return buffer.getvalue()


def photo(seed: int, size: tuple[int, int] = (64, 48), quality: int = 90) -> bytes:
    """Encode a JPEG of a random smooth pattern; size: (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def progressive(size: tuple[int, int], scans: int) -> bytes:
    """Encode a grey JPEG whose last scan is there `scans` times."""
    buffer = io.BytesIO()
    Image.new("L", size, 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[[found.start() for found in re.finditer(rb"\xff\xda", data)][-1] : -2]
    return data[:-2] + last * (scans - 1) + data[-2:]


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write files to a tar in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def two_shards(folder: Path) -> Path:
    """Write two shards of three pictures to a new folder."""
    for number in range(2):
        write_tar(folder / f"{number}.tar", {f"{n}.jpg": jpeg() for n in range(3)})
    return folder


def without_checksum(path: Path, change: Mapping[str, np.ndarray] | None = None) -> None:
    """Write a file again as commit 9205be0 did."""
    table, facts = open_columns(path)
    facts = {key: value for key, value in facts.items() if key != "left_out"}
    table = {name: np.array(column) for name, column in table.items()} | dict(change or {})
    save_file(table, path, metadata={"facts": json.dumps(facts)})


def numbered(counts: Sequence[int], name: str = "photos") -> Source:
    """Make a source from the numbers of samples per shard; its samples cannot be read."""
    blob, ends = pack_texts([f"{shard:05d}.tar" for shard in range(len(counts))])
    columns = {
        "names": blob,
        "name_ends": ends,
        "sizes": np.zeros(len(counts), np.int64),
        "mtimes": np.zeros(len(counts), np.int64),
        "counts": np.repeat(np.array(counts, np.int32)[:, None], 4, axis=1),
        "digests": np.zeros((len(counts), 32), np.uint8),
        "sha256": np.zeros((len(counts), 32), np.uint8),
    }
    return Source(name, "image", "image", Manifest("nowhere", columns, {"digest": "none"}))
