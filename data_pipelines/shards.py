"""Webdataset tars read by offset: an index beside each tar, and sources made of shards.

A sample is the run of tar members that share a key: `KEY.jpg KEY.txt KEY.json`. The index keeps
keys, offsets and sizes as columns, so that any sample is one or more `pread` calls away.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import stat
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import webdataset

from xray import dist
from xray.config import DataConfig
from xray.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")
MEDIA = {"image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS}
INDEX_VERSION = 1


@dataclass(frozen=True)
class ShardIndex:
    """Where each sample of one tar lies.

    keys: [n] str. extensions: the file endings found. offsets, sizes: [n, E] int64, -1 = absent.
    """

    path: Path
    keys: np.ndarray
    extensions: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def members_with(self, extensions: Sequence[str]) -> np.ndarray:
        """Numbers of the samples that have one of these files."""
        columns = [i for i, e in enumerate(self.extensions) if e in extensions]
        return np.flatnonzero((self.sizes[:, columns] >= 0).any(axis=1))

    def read(self, member: int, extensions: Sequence[str] | None = None) -> dict[str, bytes]:
        """The files of one sample by ending: all of them, or those asked for."""
        handle = _open(str(self.path)).fileno()
        files = {}
        for column, extension in enumerate(self.extensions):
            size = int(self.sizes[member, column])
            if size < 0 or (extensions is not None and extension not in extensions):
                continue
            files[extension] = os.pread(handle, size, int(self.offsets[member, column]))
            if len(files[extension]) != size:
                raise DataError(f"shard {self.path} changed while it was read: restart the run")
        return files


@functools.lru_cache(maxsize=256)
def _open(path: str) -> BinaryIO:
    return cast(BinaryIO, open(path, "rb", buffering=0))


def index_shard(path: Path) -> ShardIndex:
    """The index of a tar, from its cache where that is current, else built and cached.

    Raises DataError for a tar that is missing, empty, truncated or not a tar.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"shard {path} does not exist") from error
    if not os.access(path, os.R_OK):
        raise DataError(f"shard {path} cannot be read: permission denied")
    stamp = [INDEX_VERSION, status.st_size, status.st_mtime_ns]
    cached = _cache_path(path)
    index = _load_index(path, cached, stamp)
    if index is None:
        index = build_index(path)
        _save_index(index, cached, stamp)
    return index


def build_index(path: Path) -> ShardIndex:
    """Read a tar's headers, once from front to back."""
    keys: list[str] = []
    rows: list[dict[str, tuple[int, int]]] = []
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"shard {path} is empty (0 bytes): re-create it or leave it out")
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                key, extension = _split(member.name)
                if not keys or keys[-1] != key:
                    keys.append(key)
                    rows.append({})
                rows[-1][extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        last = f" after sample {keys[-1]!r}" if keys else ""
        raise DataError(
            f"shard {path} is truncated or not a tar ({error}){last}: re-create it or leave it out"
        ) from error
    if not keys:
        raise DataError(f"shard {path} holds no samples: re-create it or leave it out")
    extensions = tuple(sorted({extension for row in rows for extension in row}))
    table = np.full((2, len(rows), len(extensions)), -1, np.int64)
    for i, row in enumerate(rows):
        for extension, (offset, length) in row.items():
            table[:, i, extensions.index(extension)] = offset, length
    return ShardIndex(path, np.array(keys), extensions, table[0], table[1])


def _split(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _cache_path(path: Path) -> Path:
    """Beside the tar; in the user's cache where that folder is marked read-only."""
    folder = path.parent
    if folder.stat().st_mode & stat.S_IWUSR and os.access(folder, os.W_OK):
        return path.with_name(path.name + ".index.npz")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xray" / "index"
    cache.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    return cache / f"{name}.npz"


def _load_index(path: Path, cached: Path, stamp: list[int]) -> ShardIndex | None:
    try:
        with np.load(cached, allow_pickle=False) as columns:
            if columns["stamp"].tolist() != stamp:
                return None
            extensions = tuple(columns["extensions"].tolist())
            return ShardIndex(
                path, columns["keys"], extensions, columns["offsets"], columns["sizes"]
            )
    except (OSError, ValueError, KeyError):
        return None


def _save_index(index: ShardIndex, cached: Path, stamp: list[int]) -> None:
    temporary = cached.with_name(f"{cached.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            stamp=np.array(stamp, np.int64),
            keys=index.keys,
            extensions=np.array(index.extensions),
            offsets=index.offsets,
            sizes=index.sizes,
        )
    os.replace(temporary, cached)


@dataclass(frozen=True)
class Sample:
    """What a stage's transform gets: the files by ending, and what the plan says about them."""

    files: dict[str, bytes]
    source: str
    modality: str
    key: str
    resolution: int
    frames: int


@dataclass(frozen=True)
class Source:
    """One data source: its shards and, per shard, the members that its slots stand for.

    A slot is a place in the epoch; `slots[s][i]` is the member of shard s at slot i. Keep-lists,
    balancing and quarantine all work by changing this map.
    """

    name: str
    modality: str
    shards: tuple[ShardIndex, ...]
    slots: tuple[np.ndarray, ...] = field(repr=False)

    @property
    def counts(self) -> np.ndarray:
        """Slots per shard, [S]."""
        return np.array([len(members) for members in self.slots], np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def with_slots(self, slots: Sequence[np.ndarray]) -> Source:
        """The same shards with another slot map."""
        return Source(self.name, self.modality, self.shards, tuple(slots))

    def sample(self, shard: int, member: int, resolution: int, frames: int) -> Sample:
        """Read one member of one shard, all its files."""
        index = self.shards[shard]
        files, key = index.read(member), str(index.keys[member])
        return Sample(files, self.name, self.modality, key, resolution, frames)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over what the samples are: keys, sizes and the slot map, not their folder."""
        state = hashlib.sha256(f"{self.name}\0{self.modality}".encode())
        for shard, members in zip(self.shards, self.slots, strict=True):
            state.update("\0".join([shard.path.name, *shard.extensions, *shard.keys]).encode())
            state.update(np.ascontiguousarray(shard.sizes).tobytes())
            state.update(np.ascontiguousarray(members, np.int64).tobytes())
        return state.hexdigest()


def find_shards(pattern: str, root: str = "") -> list[Path]:
    """Tars of a folder, glob or {000..123} pattern; raises DataError when there is none."""
    full = os.path.join(os.path.expanduser(root), os.path.expanduser(pattern))
    if os.path.isdir(full):
        paths = sorted(glob.glob(os.path.join(glob.escape(full), "*.tar")))
    elif any(c in full for c in "*?["):
        paths = sorted(glob.glob(full))
    else:
        paths = webdataset.shardlists.expand_urls(full)
        if not full.endswith(".tar") and not os.path.exists(paths[0]):
            raise DataError(f"{full} is neither a folder of .tar shards nor a .tar")
    if not paths:
        raise DataError(f"no .tar shards at {full}")
    return [Path(path) for path in paths]


def open_source(name: str, pattern: str, modality: str, root: str = "") -> Source:
    """Index a source's shards; raises DataError for shards that cannot be used."""
    shards = tuple(index_shard(path) for path in find_shards(pattern, root))
    slots = []
    for shard in shards:
        members = shard.members_with(MEDIA[modality])
        if not len(members):
            endings = ", ".join(shard.extensions)
            raise DataError(
                f"shard {shard.path} of source {name!r} has no {modality} files, only {endings}: "
                f"correct data.sources.{name}"
            )
        slots.append(members)
    return Source(name, modality, shards, tuple(slots))


def open_sources(data: DataConfig, names: Sequence[str]) -> dict[str, Source]:
    """The sources that a run's blocks use; rank 0 indexes first, the others read its cache."""
    sources: dict[str, Source] = {}
    for mine in (dist.is_main(), not dist.is_main()):
        failure = None
        if mine:
            try:
                for name in names:
                    config = data.sources[name]
                    sources[name] = open_source(name, config.shards, config.modality, data.root)
            except DataError as error:
                failure = error
        dist.agree(failure)
    return sources
