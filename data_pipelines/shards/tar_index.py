"""Shard index: byte offsets of the samples in a webdataset tar, kept in a side file.

A sample is a run of consecutive files in the tar that share a key: `KEY.jpg KEY.txt KEY.json`. The
index holds keys, offsets and sizes as columns, so any file of any sample is read by one `pread`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from data_pipelines.shards.columns import (
    Columns,
    open_first,
    pack_texts,
    save_columns,
    text_at,
    unpack_texts,
)
from data_pipelines.shards.side_files import path_to_write, possible_paths
from data_pipelines.shards.tar_contents import TarContents, read_tar
from xray.errors import BadSample, DataError, brief
from xray.files import is_inside, printable, sha256_file

log = logging.getLogger("xray")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg")
TEXT_FILES = ("json", "txt")
ANIMATIONS = ("gif", "webp")
INDEX_VERSION = 2
OPEN_TARS = 64  # open files per process; an evicted tar uses disk space until its file is closed
MOST_ENDINGS = 64  # different file extensions in one shard
LARGEST = 1 << 30  # bytes of one file of a sample

Modality = Literal["image", "video", "text"]


def media_extensions(modality: Modality, animations: Modality) -> tuple[str, ...]:
    """Return the file extensions of a modality; `animations` is the modality of GIF and WebP.

    Most WebP files are still images, so an image source accepts them even if animations are clips.
    """
    if modality == "text":
        return TEXT_FILES
    if modality == "video":
        return VIDEO_EXTENSIONS + (ANIMATIONS if animations == "video" else ())
    return tuple(e for e in IMAGE_EXTENSIONS if e != "gif" or animations == "image")


def media_in(files: Mapping[str, bytes], modality: Modality, animations: Modality) -> bytes:
    """Return the bytes of the image or clip of a sample; raises BadSample if it has none."""
    for extension in media_extensions(modality, animations):
        if extension in files:
            return files[extension]
    raise BadSample(f"no {modality}")


@dataclass(frozen=True)
class ShardIndex:
    """Index of the samples in one tar: n samples with up to E files each.

    columns: keys and key_ends (packed texts); offsets and sizes of the files in bytes, [n, E]
    int64, -1 = the sample has no such file. facts: extensions (names of the E columns); size, mtime
    and sha256 of the tar ("" = not computed); digest (over keys and sizes of all samples); left_out
    (cause -> [number of members, name of the first]), which indexes of older versions lack.
    """

    path: str
    columns: Columns
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns["key_ends"])

    @property
    def keys(self) -> list[str]:
        """Keys of all samples."""
        return unpack_texts(self.columns["keys"], self.columns["key_ends"])

    @property
    def extensions(self) -> list[str]:
        """File extensions that occur in the tar, [E]."""
        return self.facts["extensions"]

    def key(self, member: int) -> str:
        """Return the key of a sample."""
        return text_at(self.columns["keys"], self.columns["key_ends"], member)

    def safe_key(self, member: int) -> str:
        """Return the key of a sample to write; raises DataError for one that leads outside."""
        key = self.key(member)
        if not is_inside(key):
            raise DataError(
                f"shard {self.path} has a sample {key!r}, which would be unpacked outside of the "
                "folder: rename it"
            )
        return key

    def members_with(self, extensions: Sequence[str]) -> np.ndarray:
        """Return the numbers of the samples that have a file with one of these extensions."""
        wanted = [i for i, e in enumerate(self.extensions) if e in extensions]
        return np.flatnonzero((self.columns["sizes"][:, wanted] >= 0).any(axis=1))

    def read(
        self, member: int, extensions: Sequence[str] | None = None, tar: str = ""
    ) -> dict[str, bytes]:
        """Read the files of one sample, as extension -> bytes.

        extensions: read only these; None = all files. tar: path of the local copy, if `path` is a
        URL. Raises DataError if the tar has changed since it was indexed, FileNotFoundError if it
        does not exist, BadSample for a file over 1 GB.
        """
        mtime = None if tar else self.facts["mtime"]  # the mtime of a local copy is different
        handle = _open(tar or self.path, self.facts["size"], mtime).file.fileno()
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
                raise DataError(f"shard {self.path} changed during reading: restart the run")
        return files


class _OpenTar:
    """An open tar, which is closed when the cache of open ones drops it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def __del__(self) -> None:
        self.file.close()


@functools.lru_cache(maxsize=OPEN_TARS)
def _open(path: str, size: int, mtime: int | None) -> _OpenTar:
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - lru_cache keeps the file open
    status = os.fstat(file.fileno())
    if status.st_size != size or mtime not in (None, status.st_mtime_ns):
        file.close()
        raise DataError(f"shard {path} changed since it was indexed: restart the run")
    return _OpenTar(cast(BinaryIO, file))


def index_shard(path: str | Path, checksum: bool = False) -> ShardIndex:
    """Return the index of a tar; it is built and saved if there is no current one.

    checksum: also compute the sha256 of the tar. Raises DataError for a file that is missing,
    empty, truncated or not a tar.
    """
    path = Path(path)
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"shard {path} does not exist") from error
    if not os.access(path, os.R_OK):
        raise DataError(f"shard {path} cannot be read: permission denied")
    wanted = path.with_name(path.name + ".index")
    stamp = {"size": status.st_size, "mtime": status.st_mtime_ns}
    index = load_index(str(path), possible_paths(wanted), **stamp)
    if index is not None and "left_out" in index.facts and (index.facts["sha256"] or not checksum):
        return index
    index = build_index(path, checksum)
    keep_columns(path_to_write(wanted), index.columns, index.facts)
    return index


def keep_columns(path: Path, columns: Columns, facts: Mapping[str, Any]) -> None:
    """Write a file that can be made again; only warn if neither its folder nor the cache can be."""
    try:
        save_columns(path, columns, facts)
    except (DataError, PermissionError) as error:
        log.warning(
            "an index is made again at each use, because it cannot be kept beside the data, and %s",
            error,
        )


def load_index(path: str, places: Iterable[Path], **wanted: Any) -> ShardIndex | None:
    """Load the first readable index of this version with these facts; None if there is none."""
    columns, facts = open_first(places, {"version": INDEX_VERSION, **wanted}, check_index)
    return ShardIndex(path, columns, facts) if columns else None


def check_index(path: Path, columns: Columns, facts: Mapping[str, Any]) -> None:
    """Raise ValueError for an index whose numbers do not fit each other or the size of the tar."""
    try:
        ends, offsets, sizes = (columns[name] for name in ("key_ends", "offsets", "sizes"))
        there = sizes >= 0
        whole = (
            offsets.shape == sizes.shape == (len(ends), len(facts["extensions"]))
            and (np.diff(ends, prepend=0) >= 0).all()
            and ends[-1:].sum() == len(columns["keys"])
            and (offsets[there] >= 0).all()
            and (sizes[there] <= facts["size"] - offsets[there]).all()
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: no {brief(error)}") from error
    if not whole:
        raise ValueError(f"{path} is damaged: it has places outside of the tar")


def build_index(path: Path, checksum: bool = False) -> ShardIndex:
    """Build the index of a tar by reading all its headers; raises DataError for a broken tar."""
    status, contents = path.stat(), read_tar(path)
    return index_of(path, contents, status, sha256_file(path) if checksum else "")


def index_of(path: Path, contents: TarContents, status: os.stat_result, sha256: str) -> ShardIndex:
    """Make the index of a tar from its contents; raises DataError if it cannot have one.

    status: of the tar, from before its contents were read.
    """
    extensions = sorted({extension for row in contents.rows for extension in row})
    if len(extensions) > MOST_ENDINGS:
        raise DataError(
            f"shard {path} has {len(extensions):,} different file extensions, such as "
            f"{extensions[0]!r}: the key of a sample ends at the first dot of its file name, so "
            "use keys without dots"
        )
    numbers = {extension: number for number, extension in enumerate(extensions)}
    table = np.full((2, len(contents.rows), len(extensions)), -1, np.int64)
    for i, row in enumerate(contents.rows):
        for extension, place in row.items():
            table[:, i, numbers[extension]] = place
    blob, ends = pack_texts(contents.keys)
    columns = {"keys": blob, "key_ends": ends, "offsets": table[0], "sizes": table[1]}
    facts = {
        "version": INDEX_VERSION,
        "extensions": extensions,
        "size": status.st_size,
        "mtime": status.st_mtime_ns,
        "sha256": sha256,
        "digest": _digest(columns, extensions),
        "left_out": {
            cause: [len(names), printable(names[0])] for cause, names in contents.left_out.items()
        },
    }
    return ShardIndex(str(path), columns, facts)


def _digest(columns: Columns, extensions: list[str]) -> str:
    """Return the sha256 of keys, extensions and sizes; offsets in the tar are left out."""
    state = hashlib.sha256("\0".join(extensions).encode("utf-8", "surrogateescape"))
    for name in ("keys", "key_ends", "sizes"):
        state.update(np.ascontiguousarray(columns[name]).tobytes())
    return state.hexdigest()
