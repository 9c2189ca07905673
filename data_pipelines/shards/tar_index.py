"""Webdataset tars read by offset, with an index beside each tar.

A sample is the run of tar members that share a key: `KEY.jpg KEY.txt KEY.json`. The index keeps
keys, offsets and sizes as columns, so that any sample is one or more `pread` calls away.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.columns import (
    Columns,
    open_columns,
    pack_texts,
    save_columns,
    text_at,
    unpack_texts,
)
from xray.errors import DataError
from xray.files import sha256_file

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg")
TEXT_FILES = ("json", "txt")
ANIMATIONS = ("gif", "webp")
INDEX_VERSION = 2
OPEN_TARS = 64  # kept open per process; a cached tar that was evicted keeps its space until then
MOST_ENDINGS = 64  # of file names in one shard
CHUNK = 1 << 22
LARGEST = 1 << 30  # bytes of one file of a sample

Modality = Literal["image", "video", "text"]


def media_extensions(modality: Modality, animations: Modality) -> tuple[str, ...]:
    """The file endings of a modality; GIF and WebP count as what `animations` says.

    A WebP is mostly a still, so an image source keeps it even where animations are clips.
    """
    if modality == "text":
        return TEXT_FILES
    if modality == "video":
        return VIDEO_EXTENSIONS + (ANIMATIONS if animations == "video" else ())
    return tuple(e for e in IMAGE_EXTENSIONS if e != "gif" or animations == "image")


def media_in(files: Mapping[str, bytes], modality: Modality, animations: Modality) -> bytes:
    """The picture or clip among a sample's files; raises BadSample."""
    for extension in media_extensions(modality, animations):
        if extension in files:
            return files[extension]
    raise BadSample(f"no {modality}")


@dataclass(frozen=True)
class ShardIndex:
    """Where each sample of one tar lies.

    columns: keys and key_ends (packed texts), offsets and sizes [n, E] int64, -1 = absent.
    facts: extensions (of the E columns), size, mtime and sha256 of the tar ("" = not taken),
    digest (over keys and sizes of all samples).
    """

    path: str
    columns: Columns
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns["key_ends"])

    @property
    def keys(self) -> list[str]:
        return unpack_texts(self.columns["keys"], self.columns["key_ends"])

    @property
    def extensions(self) -> list[str]:
        return self.facts["extensions"]

    def key(self, member: int) -> str:
        return text_at(self.columns["keys"], self.columns["key_ends"], member)

    def members_with(self, extensions: Sequence[str]) -> np.ndarray:
        """Numbers of the samples that have one of these files."""
        wanted = [i for i, e in enumerate(self.extensions) if e in extensions]
        return np.flatnonzero((self.columns["sizes"][:, wanted] >= 0).any(axis=1))

    def read(
        self, member: int, extensions: Sequence[str] | None = None, tar: str = ""
    ) -> dict[str, bytes]:
        """The files of one sample by ending: all of them, or those asked for.

        tar: the local copy, where `path` is remote. Raises DataError where the tar is not the one
        that was indexed, FileNotFoundError where it is gone.
        """
        changes = None if tar else self.facts["mtime"]  # a copy has a time of its own
        handle = _open(tar or self.path, self.facts["size"], changes).fileno()
        sizes = self.columns["sizes"][member].tolist()
        offsets = self.columns["offsets"][member].tolist()
        files = {}
        for extension, size, offset in zip(self.extensions, sizes, offsets, strict=True):
            if size < 0 or (extensions is not None and extension not in extensions):
                continue
            if size > LARGEST:
                raise BadSample("file too large", f"{size / 1e9:.1f} GB")
            files[extension] = os.pread(handle, size, offset)
            if len(files[extension]) != size:
                raise DataError(f"shard {self.path} changed while it was read: restart the run")
        return files


@functools.lru_cache(maxsize=OPEN_TARS)
def _open(path: str, size: int, mtime: int | None) -> BinaryIO:
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - the cache keeps it open
    status = os.fstat(file.fileno())
    if status.st_size != size or mtime not in (None, status.st_mtime_ns):
        file.close()
        raise DataError(f"shard {path} changed since it was indexed: restart the run")
    return cast(BinaryIO, file)


def index_shard(path: str | Path, checksum: bool = False) -> ShardIndex:
    """The index of a tar, from its cache where that is current, else built and cached.

    checksum: with the tar's sha256. Raises DataError for a tar that is missing, empty, truncated
    or not a tar.
    """
    path = Path(path)
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"shard {path} does not exist") from error
    if not os.access(path, os.R_OK):
        raise DataError(f"shard {path} cannot be read: permission denied")
    wanted = path.with_name(path.name + ".index")
    stamp = (status.st_size, status.st_mtime_ns)
    for kept in kept_at(wanted):
        index = load_index(str(path), kept)
        current = index is not None and (index.facts["size"], index.facts["mtime"]) == stamp
        if index is not None and current and (index.facts["sha256"] or not checksum):
            return index
    index = build_index(path, checksum)
    save_columns(cache_path(wanted), index.columns, index.facts)
    return index


def load_index(path: str, cached: Path) -> ShardIndex | None:
    """The index in a file, or None where there is none that can be used."""
    try:
        columns, facts = open_columns(cached)
        return ShardIndex(path, columns, facts) if facts["version"] == INDEX_VERSION else None
    except (OSError, ValueError, KeyError):
        return None


def build_index(path: Path, checksum: bool = False) -> ShardIndex:
    """Read a tar's headers, once from front to back; raises DataError for a broken tar."""
    keys: list[str] = []
    rows: list[dict[str, tuple[int, int]]] = []
    status = path.stat()
    if status.st_size == 0:
        raise DataError(f"shard {path} is empty (0 bytes): re-create it or leave it out")
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > status.st_size:
                    raise tarfile.ReadError("unexpected end of data")
                key, extension = _split(member.name)
                if not keys or keys[-1] != key:
                    keys.append(key)
                    rows.append({})
                rows[-1][extension] = (member.offset_data, member.size)
                cast(Any, archive).members.clear()  # tarfile keeps every header otherwise
            _check_end(path, archive.offset)
    except tarfile.TarError as error:
        last = f" after sample {keys[-1]!r}" if keys else ""
        raise DataError(
            f"shard {path} is truncated, damaged or not a tar ({error}){last}: re-create it or "
            "leave it out"
        ) from error
    if not keys:
        raise DataError(f"shard {path} holds no samples: re-create it or leave it out")
    extensions = sorted({extension for row in rows for extension in row})
    if len(extensions) > MOST_ENDINGS:
        raise DataError(
            f"shard {path} has {len(extensions):,} kinds of file endings, such as "
            f"{extensions[0]!r}: a sample's key ends at the first dot of its file names, so leave "
            "dots out of keys"
        )
    table = np.full((2, len(rows), len(extensions)), -1, np.int64)
    for i, row in enumerate(rows):
        for extension, (offset, length) in row.items():
            table[:, i, extensions.index(extension)] = offset, length
    blob, ends = pack_texts(keys)
    columns = {"keys": blob, "key_ends": ends, "offsets": table[0], "sizes": table[1]}
    facts = {
        "version": INDEX_VERSION,
        "extensions": extensions,
        "size": status.st_size,
        "mtime": status.st_mtime_ns,
        "sha256": sha256_file(path) if checksum else "",
        "digest": _digest(columns, extensions),
    }
    return ShardIndex(str(path), columns, facts)


def _check_end(path: Path, offset: int) -> None:
    """Where tarfile stopped there is nothing but zeros, or nothing: it takes bad headers for it."""
    with path.open("rb") as file:
        file.seek(offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"no header at byte {offset:,}")


def _digest(columns: Columns, extensions: list[str]) -> str:
    """sha256 over what the samples are: keys, endings and sizes, not where they lie."""
    state = hashlib.sha256("\0".join(extensions).encode())
    for name in ("keys", "key_ends", "sizes"):
        state.update(np.ascontiguousarray(columns[name]).tobytes())
    return state.hexdigest()


def _split(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def cache_path(wanted: Path) -> Path:
    """Where to keep a derived file: at `wanted`; in the user's cache where that is read-only."""
    folder = wanted.parent
    if folder.stat().st_mode & stat.S_IWUSR and os.access(folder, os.W_OK):
        return wanted
    return user_cache("index") / hashlib.sha256(str(wanted.resolve()).encode()).hexdigest()[:32]


def kept_at(wanted: Path) -> list[Path]:
    """Where a derived file may be: beside the data, whoever made it, or in the user's cache."""
    private = cache_path(wanted)
    return [wanted] if private == wanted else [wanted, private]


def user_cache(name: str) -> Path:
    """A folder of the user's cache, made where it is missing."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xray" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
