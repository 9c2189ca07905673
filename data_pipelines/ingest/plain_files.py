"""Source of plain files: a folder, a list or single files is read as one shard.

A sample's files are its picture or clip, and its captions and metadata as `json`. `xray data pack`
would write the same. A .txt file is also read as one shard, with a sample per line.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipelines.ingest.endings import by_ending, ending_of
from data_pipelines.ingest.listing import Item
from data_pipelines.ingest.row_captions import texts_in
from data_pipelines.shards.columns import pack_texts
from data_pipelines.shards.manifest import COUNTED, Manifest
from data_pipelines.shards.remote import ShardCache
from data_pipelines.shards.side_files import user_cache
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import Modality, ShardIndex, media_extensions
from data_pipelines.text.captions import is_by_language
from xray.errors import BadSample, ConfigError, DataError
from xray.files import encoding_of, sha256_file

log = logging.getLogger("xray")


@dataclass(frozen=True)
class Request:
    """Settings of the source to open."""

    name: str
    modality: Modality | Literal[""] = ""  # "": the first of image, video and text in the data
    animations: Modality = "image"  # modality of GIF and WebP files
    cache: ShardCache | None = None
    known: str = ""  # state of the manifest, if it was compared with the tars just before


WORDS = {"image": "pictures", "video": "clips"}


@dataclass(frozen=True)
class SingleShard(Source, ABC):
    """Source of one shard that is not a tar; derived files are written to the user's cache."""

    place: str = ""  # the folder that the samples' keys and names are relative to, or the text file

    def derived_at(self, name: str, shard: int | None = None) -> list[Path]:
        """Return the paths where a derived file may be: only the user's cache."""
        own = self.manifest.digest[:32]
        file = f"shards-{own}" if shard is None else own
        return [user_cache("index") / f"{file}.{name}"]

    @abstractmethod
    def keys(self) -> list[str]:
        """Return the keys of all samples."""

    def _open(self, shard: int) -> tuple[ShardIndex, np.ndarray]:
        blob, ends = pack_texts(self.keys())
        facts = {"extensions": [], "digest": self.manifest.digest}
        columns = {"keys": blob, "key_ends": ends}
        return ShardIndex(self.manifest.path(shard), columns, facts), np.arange(len(ends))

    @property
    def digest(self) -> str:
        """sha256 over the samples."""
        return self.manifest.digest


@dataclass(frozen=True)
class FileSource(SingleShard):
    """Pictures or clips in files. others: number of input files of another modality."""

    items: Sequence[Item] = field(default=(), repr=False)
    others: int = 0

    def keys(self) -> list[str]:
        """Return the names of the files, without their endings."""
        return [os.path.splitext(item.name)[0] for item in self.items]

    def read(
        self, shard: int, member: int, extensions: Sequence[str] | None = None
    ) -> dict[str, bytes]:
        """Read the files of one sample; raises BadSample for a missing file."""
        return read_item(self.items[member], extensions)


def read_item(item: Item, extensions: Sequence[str] | None = None) -> dict[str, bytes]:
    """Read a file with its captions and metadata; raises BadSample for a missing file."""
    files, ending = {}, ending_of(item.name)
    if extensions is None or ending in extensions:
        try:
            files[ending] = item.read()
        except BadSample as error:
            raise BadSample(error.cause, f"{item.path}: {error.detail}") from error
    if extensions is None or "json" in extensions:
        files |= _texts_of(item)
    return files


def _texts_of(item: Item) -> dict[str, bytes]:
    """Return captions and metadata as a sample's json; broken sidecars are returned unchanged."""
    try:
        captions, meta = item.describe()
    except BadSample:
        own = {"json": json.dumps(item.meta, default=str).encode()} if item.meta else {}
        kinds = {
            path: "json" if path.suffix.lower() == ".json" else "txt" for path in item.sidecars
        }
        return own | {kind: path.read_bytes() for path, kind in kinds.items() if path.is_file()}
    listed = meta.get("captions")
    if captions != texts_in(listed) and not is_by_language(listed):
        meta = {**meta, "captions": captions}
    return {"json": json.dumps(meta, default=str).encode()} if meta else {}


def source_of_files(items: Sequence[Item], where: str, place: str, request: Request) -> FileSource:
    """Return the files of one modality as a source; raises DataError if there are none."""
    listed = [item for item in items if item.listed]
    if unlisted := [item.name for item in items if not item.listed]:
        log.warning("%s: no row of its metadata names %s", where, by_ending(unlisted))
    kinds: tuple[Modality, ...] = ("image", "video")
    if request.modality:
        kinds = (request.modality,)
    for kind in kinds:
        endings = media_extensions(kind, request.animations)
        text = kind == "text"
        mine = [item for item in listed if text or ending_of(item.name) in endings]
        if mine:
            state = hashlib.sha256(kind.encode())
            for item in mine:
                state.update(f"{item.stamp()}\n".encode("utf-8", "surrogateescape"))
            manifest = manifest_of_one(where, len(mine), state.hexdigest())
            found = FileSource(request.name, kind, request.animations, manifest, place=place)
            return replace(found, items=tuple(mine), others=len(listed) - len(mine))
    wanted = WORDS.get(request.modality, "pictures or clips")
    raise DataError(f"{where} contains no {wanted}")


def manifest_of_one(where: str, samples: int, digest: str) -> Manifest:
    """Return the manifest of a single shard that is not a tar."""
    path = Path(where)
    blob, ends = pack_texts([path.name])
    columns = {
        "names": blob,
        "name_ends": ends,
        "sizes": np.zeros(1, np.int64),
        "mtimes": np.zeros(1, np.int64),
        "counts": np.full((1, len(COUNTED)), samples, np.int32),
        "digests": np.frombuffer(bytes.fromhex(digest), np.uint8)[None],
        "sha256": np.zeros((1, 32), np.uint8),
    }
    return Manifest(str(path.parent), columns, {"digest": digest})


def list_file(where: str) -> list[Item]:
    """Return a single picture or clip, named by its absolute path."""
    path = Path(where).absolute()
    return [Item(path, str(path).lstrip(os.sep))]


BLOCK = 1 << 24  # bytes of a text file to read at a time


@dataclass(frozen=True)
class LineSource(SingleShard):
    """Texts, one per line; the key of a line is its number from 1."""

    def keys(self) -> list[str]:
        """Return the numbers of the lines."""
        return [str(number) for number in range(1, len(self) + 1)]

    @functools.cached_property
    def encoding(self) -> tuple[str, int]:
        """Encoding of the file, and the length of its byte-order mark."""
        return _encoding_of(Path(self.place))

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Offset of the end of each line, [N]."""
        return _line_ends(Path(self.place))

    def read(
        self, shard: int, member: int, extensions: Sequence[str] | None = None
    ) -> dict[str, bytes]:
        """Read one line as the sample's `txt`; raises BadSample for an empty or unreadable one."""
        encoding, mark = self.encoding
        start = int(self.ends[member - 1]) + UNITS[encoding].itemsize if member else mark
        with open(self.place, "rb") as file:
            file.seek(start)
            line = file.read(int(self.ends[member]) - start)
        try:
            text = line.decode(encoding).strip()
        except UnicodeDecodeError as error:
            raise BadSample("not UTF-8", f"line {member + 1}") from error
        if "\0" in text:
            raise BadSample("not UTF-8", f"line {member + 1} has NUL characters")
        if not text:
            raise BadSample("empty line")
        return {"txt": text.encode()}


UNITS: dict[str, np.dtype[Any]] = {  # encoding -> type of the units that characters consist of
    "utf-8": np.dtype("u1"),
    "utf-16-le": np.dtype("<u2"),
    "utf-16-be": np.dtype(">u2"),
    "utf-32-le": np.dtype("<u4"),
    "utf-32-be": np.dtype(">u4"),
}


def _encoding_of(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return encoding_of(file.read(4))


def _line_ends(path: Path) -> np.ndarray:
    unit = UNITS[_encoding_of(path)[0]]
    found, at = [np.empty(0, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            units = np.frombuffer(block, unit, len(block) // unit.itemsize)
            found.append(at + np.flatnonzero(units == 10) * unit.itemsize)
            at += len(block)
    ends = np.concatenate(found)
    whole = at == 0 or (len(ends) and ends[-1] == at - unit.itemsize)
    return ends if whole else np.append(ends, at)


def open_lines(where: str, request: Request) -> LineSource:
    """Open a text file; raises DataError for an empty one, ConfigError for another modality."""
    if request.modality not in ("", "text"):
        raise ConfigError(f"{where} contains texts: leave out the modality {request.modality}")
    path = Path(where).absolute()
    count = len(_line_ends(path))
    if not count:
        raise DataError(f"{where} is empty")
    manifest = manifest_of_one(str(path), count, sha256_file(path))
    return LineSource(request.name, "text", request.animations, manifest, place=str(path))
