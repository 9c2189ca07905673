"""What a user gives to be embedded: shards, a folder or list of files, files, or lines of text.

All are samples by (shard, member), as those of a source are; files and lines are of one shard.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.ingest.listing import READERS, Item, list_items
from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.manifest import open_manifest, resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import Sample, Source, make_cache, open_source
from data_pipelines.shards.tar_index import (
    IMAGE_EXTENSIONS,
    TEXT_FILES,
    VIDEO_EXTENSIONS,
    Modality,
    media_extensions,
)
from data_pipelines.shards.utf8 import printable
from data_pipelines.text.captions import captions_of
from xray.config import DataConfig
from xray.errors import ConfigError, DataError
from xray.files import sha256_file

BLOCK = 1 << 24  # bytes of a text file that are looked through at a time
MEDIA = tuple(f".{ending}" for ending in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))


class Corpus(Protocol):
    """Samples by (shard, member), each with a name: counts per shard [S], and what they are."""

    @property
    def counts(self) -> np.ndarray: ...

    @property
    def modality(self) -> Modality: ...

    @property
    def digest(self) -> str: ...

    @property
    def where(self) -> str:
        """What finds them again: a pattern of shards, a folder or a file."""

    def member(self, shard: int, slot: int) -> int: ...

    def name(self, shard: int, member: int) -> tuple[str, str]:
        """(key, the path of what it lies in, of shards and files below `where`)."""

    def sample(self, shard: int, member: int, resolution: int, frames: int) -> Sample:
        """A picture or clip to decode; raises BadSample."""

    def texts(self, shard: int, member: int) -> list[str]:
        """Its captions, or itself; raises BadSample where there is none."""


@dataclass(frozen=True)
class Shards:
    """The samples of a source."""

    source: Source
    where: str
    captions: Mapping[str, float] = field(default_factory=dict)  # their json fields
    others: int = 0  # pictures or clips, of which this is not the modality

    @property
    def counts(self) -> np.ndarray:
        return self.source.counts

    @property
    def modality(self) -> Modality:
        return self.source.modality

    @property
    def digest(self) -> str:
        return self.source.digest

    def member(self, shard: int, slot: int) -> int:
        return self.source.member(shard, slot)

    def name(self, shard: int, member: int) -> tuple[str, str]:
        key = self.source.index(shard).key(member)
        return printable(key), printable(self.source.manifest.name(shard))

    def sample(self, shard: int, member: int, resolution: int, frames: int) -> Sample:
        return self.source.sample(shard, member, resolution, frames)

    def texts(self, shard: int, member: int) -> list[str]:
        files = self.source.read(shard, member, TEXT_FILES)
        return [printable(text) for text in captions_of(files, self.captions)]


@dataclass(frozen=True)
class Files:
    """Pictures or clips that lie in files."""

    items: Sequence[Item]
    where: str
    modality: Modality
    others: int = 0  # files of another modality, or of none

    @property
    def counts(self) -> np.ndarray:
        return np.array([len(self.items)], np.int64)

    @functools.cached_property
    def digest(self) -> str:
        state = hashlib.sha256(self.modality.encode())
        for item in self.items:
            state.update(f"{item.stamp()}\n".encode("utf-8", "surrogateescape"))
        return state.hexdigest()

    def member(self, shard: int, slot: int) -> int:
        return slot

    def name(self, shard: int, member: int) -> tuple[str, str]:
        name = printable(self.items[member].name)
        return os.path.splitext(name)[0], name

    def sample(self, shard: int, member: int, resolution: int, frames: int) -> Sample:
        path = self.items[member].path
        ending = path.suffix.lower()[1:]
        try:
            media = {ending: path.read_bytes()}
        except OSError as error:
            raise BadSample("missing file", f"{path}: {error.strerror}") from error
        return Sample(media, "files", self.modality, path.stem, resolution, frames)

    def texts(self, shard: int, member: int) -> list[str]:
        found = [printable(text) for text in self.items[member].describe()[0]]
        if not found:
            raise BadSample("no caption")
        return found


@dataclass(frozen=True)
class Lines:
    """The lines of a text file; an empty one is a bad sample, so that line numbers stay true."""

    path: Path
    modality: Modality = "text"

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Where each line ends, [N]."""
        found, at = [np.empty(0, np.int64)], 0
        with self.path.open("rb") as file:
            while block := file.read(BLOCK):
                found.append(at + np.flatnonzero(np.frombuffer(block, np.uint8) == 10))
                at += len(block)
        ends = np.concatenate(found)
        return ends if at == 0 or (len(ends) and ends[-1] == at - 1) else np.append(ends, at)

    @property
    def counts(self) -> np.ndarray:
        return np.array([len(self.ends)], np.int64)

    @functools.cached_property
    def digest(self) -> str:
        return sha256_file(self.path)

    @property
    def where(self) -> str:
        return str(self.path.absolute())

    def member(self, shard: int, slot: int) -> int:
        return slot

    def name(self, shard: int, member: int) -> tuple[str, str]:
        return str(member + 1), printable(self.path.name)

    def sample(self, shard: int, member: int, resolution: int, frames: int) -> Sample:
        raise BadSample("no picture", "a line of text")

    def texts(self, shard: int, member: int) -> list[str]:
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
        return [text]


def open_corpus(
    given: Sequence[str],
    modality: str = "",
    texts: bool = False,
    captions: Mapping[str, float] | None = None,
) -> Corpus:
    """The samples of one folder, list, text file or pattern of shards, or of single files.

    modality: image or video, where there are both; "" = what there is, pictures first. texts: what
    is wanted are captions. Raises ConfigError or DataError for what holds none of it.
    """
    if modality not in ("", "image", "video"):
        raise ConfigError(f"--modality {modality}: use image or video")
    if all(name.lower().endswith(MEDIA) and not is_remote(name) for name in given):
        return _files([_item(name) for name in given], os.sep, ", ".join(given), modality, texts)
    if len(given) > 1:
        raise ConfigError(
            f"{given[0]}, {given[1]}, ...: give pictures or clips, or one folder, one .txt, one "
            "list of files or one pattern of shards"
        )
    pattern = os.path.expanduser(given[0])
    path = Path(pattern)
    if path.suffix == ".txt" and path.is_file():
        return _lines(path)
    if path.is_dir() and not any(path.glob("*.tar")):
        return _files(list_items(path), str(path.absolute()), pattern, modality, texts)
    if path.suffix.lower() in READERS and path.is_file():
        return _files(list_items(path), str(path.absolute().parent), pattern, modality, texts)
    if not is_remote(pattern) and not path.exists() and not any(c in pattern for c in "*?[{"):
        raise DataError(f"{pattern} does not exist")
    return _shards(pattern, "text" if texts else modality, captions or {})


def _item(name: str) -> Item:
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise DataError(f"{name} does not exist")
    return Item(path, str(path).lstrip(os.sep))


def _files(items: list[Item], where: str, what: str, modality: str, texts: bool) -> Files:
    listed = [item for item in items if item.listed]
    kinds: tuple[Any, ...] = (modality,) if modality else ("image", "video")
    for kind in kinds:
        endings = tuple(f".{ending}" for ending in media_extensions(kind, "image"))
        mine = [item for item in listed if texts or item.name.lower().endswith(endings)]
        if mine:
            return Files(mine, where, "text" if texts else kind, len(listed) - len(mine))
    wanted = {"image": "pictures", "video": "clips"}.get(modality, "pictures, clips or shards")
    raise DataError(f"{what} holds no {wanted}")


def _lines(path: Path) -> Lines:
    found = Lines(path)
    if not found.counts[0]:
        raise DataError(f"{path} is empty")
    return found


def _shards(pattern: str, modality: str, captions: Mapping[str, float]) -> Shards:
    cache = make_cache(DataConfig())
    manifest = open_manifest(resolve(pattern), cache)
    kinds: tuple[Modality, ...] = ("image", "video", "text")
    held = {kind: int(manifest.counts(kind, "image").sum()) for kind in kinds}
    kind: Any = modality or next((kind for kind in kinds if held[kind]), "image")
    source = open_source("corpus", pattern, kind, cache=cache, verify=False)
    where = pattern if is_remote(pattern) else os.path.abspath(pattern)
    others = 0 if kind == "text" else held["video" if kind == "image" else "image"]
    return Shards(source, where, captions, others)
