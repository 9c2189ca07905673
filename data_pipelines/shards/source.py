"""Data source: the manifest of its shards, and the samples that are used."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from data_pipelines.shards import meter
from data_pipelines.shards.manifest import (
    Manifest,
    open_manifest,
    resolve,
)
from data_pipelines.shards.remote import ShardCache, is_remote
from data_pipelines.shards.remote_index import remote_cache_path, remote_index
from data_pipelines.shards.side_files import possible_paths, user_cache
from data_pipelines.shards.tar_index import (
    Modality,
    ShardIndex,
    index_shard,
    load_index,
    media_extensions,
)
from xray import dist
from xray.config import DataConfig
from xray.errors import DataError
from xray.urls import reveal

OPEN_INDEXES = 128  # index files that stay mapped in memory, per source and process
EVICTIONS = 5  # evictions of a shard between fetch and open, before the run gives up


S = TypeVar("S", bound="Source")


class Slots(Protocol):
    """Slot map of a source: the member of each slot, and the number of slots."""

    counts: np.ndarray  # slots per shard, [S] int64
    digest: str

    def of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (members, copies) of a shard's slots."""

    def texts(self, shard: int, slot: int) -> np.ndarray | None:
        """Return the numbers of the captions to use with a slot's sample; None = all."""


class ChosenSlots:
    """Slots of some samples of a source, once each; numbers: their places in it, ascending."""

    def __init__(self, source: Source, numbers: np.ndarray) -> None:
        shards, members = np.array(list(source.places())).reshape(-1, 2)[numbers].T
        self.members = [members[shards == shard] for shard in range(len(source.manifest))]
        self.counts = np.array([len(own) for own in self.members], np.int64)
        self.numbers = numbers
        self.digest = hashlib.sha256(numbers.astype(np.int64).tobytes()).hexdigest()

    def of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (members, copies) of a shard's slots."""
        return self.members[shard], np.zeros_like(self.members[shard])

    def texts(self, shard: int, slot: int) -> np.ndarray | None:
        """Return None: all captions are used."""
        return None


@dataclass
class SharedDecoding:
    """Parts that the views of a sample have in common: its decoded frames, and how to draw them."""

    rng: np.random.Generator | None  # of the choice of frames
    pixels: Any = None  # [T, 3, H, W] uint8, from the first view on
    size: tuple[int, int] = (0, 0)  # (width, height) before decoding at a smaller scale


class DeferredDecoding(Protocol):
    """Decoding of an image that is left to the device, for one sample."""

    def take(self, media: bytes, draw: Callable[[int, int], tuple[Any, Any]], side: int) -> Any:
        """Keep an image for the device and return an empty tensor of the shape of its pixels.

        draw: makes the sample's random draws for an image of (width, height), upright: its crop and
        its augmentation. Returns None, without a draw, for an image that the device cannot decode.
        Raises BadSample if the header is broken.
        """


@dataclass(frozen=True)
class Sample:
    """Input of a stage's transform: files by ending, and their place in the plan."""

    files: dict[str, bytes]
    source: str
    modality: Modality
    key: str
    resolution: int
    frames: int
    animations: Modality = "image"  # modality of GIF and WebP files
    shard: int = 0
    member: int = 0  # row in the shard's index
    copy: int = 0  # number of this repeat of the sample in an epoch
    texts: tuple[int, ...] | None = None  # numbers of the captions to use, None = all
    shared: SharedDecoding | None = None  # if several views of it are made (`data.views`)
    deferred: DeferredDecoding | None = None  # if the device may decode it (`data.decode`)


@dataclass(frozen=True)
class Source:
    """Shards of one modality, and the member of each slot.

    A slot is a place in the epoch. By default, the slots of a shard are its members of the
    modality, once each. A stage that leaves out or repeats samples sets `slots`.
    """

    name: str
    modality: Modality
    animations: Modality
    manifest: Manifest
    cache: ShardCache | None = None
    slots: Slots | None = field(default=None, repr=False)
    classes: tuple[str, ...] = ()  # names of the numbered classes, if known

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Slots per shard, [S]."""
        if self.slots is not None:
            return self.slots.counts
        return self.manifest.counts(self.modality, self.animations)

    def __len__(self) -> int:
        return int(self.counts.sum(dtype=np.int64))

    def with_slots(self, slots: Slots) -> Source:
        """Return the same shards with another slot map."""
        return replace(self, slots=slots)

    def as_kind(self, kind: type[S], **more: Any) -> S:
        """Return the same samples as a source of another kind, with more or other fields."""
        return kind(**{**self.__getstate__(), **more})

    def __getstate__(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}  # no open files

    def index(self, shard: int) -> ShardIndex:
        return self._opened(shard)[0]

    @functools.cached_property
    def _opened(self) -> functools._lru_cache_wrapper[tuple[ShardIndex, np.ndarray]]:
        return functools.lru_cache(maxsize=OPEN_INDEXES)(self._open)

    def _open(self, shard: int) -> tuple[ShardIndex, np.ndarray]:
        path = self.manifest.path(shard)
        wanted = self.manifest.index_digest(shard)
        if self.cache is not None:
            index = remote_index(path, self.cache, *self.manifest.tar(shard))
        else:  # the manifest was compared with the tars when it was opened
            stamp = self.manifest.stamp(shard)
            places = possible_paths(Path(f"{path}.index"))
            index = load_index(path, places, digest=wanted, **stamp) or index_shard(path)
        if index.facts["digest"] != wanted:
            raise DataError(
                f"shard {path} changed since it was indexed: restart the run; if it stops here "
                f"again, run xray data index on {shlex.quote(self.manifest.folder)}"
            )
        return index, index.members_with(media_extensions(self.modality, self.animations))

    def member(self, shard: int, slot: int) -> int:
        """Return the member of a slot."""
        return int(self.members(shard)[slot])

    def members(self, shard: int) -> np.ndarray:
        """Return the member of each slot of a shard."""
        return self._opened(shard)[1] if self.slots is None else self.slots.of(shard)[0]

    def derived(self, name: str, shard: int | None = None) -> Path:
        """Return the path to write a file derived from a shard, or from all shards."""
        return self.derived_at(name, shard)[-1]

    def derived_at(self, name: str, shard: int | None = None) -> list[Path]:
        """Return the paths where a derived file may be, the one to write it to last."""
        these = f"{self.manifest.folder}/shards-{self.manifest.digest[:8]}"
        where = these if shard is None else self.manifest.path(shard)
        if self.cache is not None:
            # Earlier versions hashed the whole URL, with its credentials.
            urls = dict.fromkeys([reveal(where), where])
            return [remote_cache_path(url, self.cache, name) for url in urls]
        return possible_paths(Path(f"{where}.{name}"))

    def read(
        self, shard: int, member: int, extensions: Sequence[str] | None = None
    ) -> dict[str, bytes]:
        """Read the files of one member; a remote tar is fetched first. Raises DataError."""
        index = self.index(shard)
        for _ in range(EVICTIONS):
            try:
                return index.read(member, extensions, self._local(shard))
            except FileNotFoundError as error:  # a remote tar was evicted in between
                if self.cache is None:
                    raise DataError(f"shard {index.path} no longer exists") from error
        raise DataError(
            f"shard {index.path} is evicted before it can be read: raise data.cache_gb, or lower "
            "data.lanes or data.shuffle_shards"
        )

    def _local(self, shard: int) -> str:
        """Return the local copy of a remote tar, fetched if necessary; "" for a local tar."""
        if self.cache is None:
            return ""
        misses = self.cache.misses
        local = self.cache.fetch(self.manifest.path(shard), *self.manifest.tar(shard))
        meter.count("miss" if self.cache.misses > misses else "hit", 1)
        return str(local)

    def prefetch(self, shard: int) -> None:
        """Start fetching a remote tar; do nothing for a local one."""
        if self.cache is not None:
            self.cache.prefetch(self.manifest.path(shard), *self.manifest.tar(shard))

    def sample(
        self, shard: int, member: int, resolution: int, frames: int, slot: int | None = None
    ) -> Sample:
        """Read all files of one member; with its slot, also its copy number and captions."""
        files, key = self.read(shard, member), self.index(shard).key(member)
        kind = self.modality, key, resolution, frames, self.animations
        sample = Sample(files, self.name, *kind, shard, member)
        if self.slots is None or slot is None:
            return sample
        copy, texts = int(self.slots.of(shard)[1][slot]), self.slots.texts(shard, slot)
        return replace(sample, copy=copy, texts=None if texts is None else tuple(texts.tolist()))

    def identity(self, shard: int, member: int) -> str:
        """Return the seed text of a sample's random draws: the names of its shard and of itself.

        It does not depend on the shards' folder or on the source's name.
        """
        names = self.manifest.seed_names
        name = names[shard] if names else self.manifest.name(shard)
        return f"{name.rpartition('/')[2]}\0{self.index(shard).key(member)}"

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield (shard, member) of every slot, in order."""
        for shard in range(len(self.manifest)):
            for member in self.members(shard).tolist():
                yield shard, member

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over the samples' keys, sizes and slot map; independent of their folder."""
        kind = f"{self.name}\0{self.modality}\0{self.animations}\0{self.manifest.digest}"
        state = hashlib.sha256(kind.encode("utf-8", "surrogateescape"))
        if self.slots is not None:
            state.update(self.slots.digest.encode())
        return state.hexdigest()


def open_source(
    name: str,
    pattern: str,
    modality: Modality,
    root: str = "",
    animations: Modality = "image",
    cache: ShardCache | None = None,
    known: str = "",
) -> Source:
    """Open shards as a source; raises DataError for shards that cannot be used.

    known: as in `open_manifest`.
    """
    where = resolve(pattern, root)
    if is_remote(where):
        cache = cache or make_cache(DataConfig())
    try:
        manifest = open_manifest(where, cache, known)
    except DataError as error:
        raise DataError(f"source {name!r}: {error}") from error
    source = Source(name, modality, animations, manifest, cache if is_remote(where) else None)
    if source.cache is not None and len(manifest):
        largest = int(manifest.columns["sizes"].max())
        if largest > source.cache.limit:
            raise DataError(
                f"a shard of source {name!r} has {largest / 1e9:.1f} GB, more than the whole "
                f"cache: raise data.cache_gb above {source.cache.limit / 1e9:g}"
            )
    empty = np.flatnonzero(source.counts == 0)
    if len(empty):
        index = source.index(int(empty[0]))
        raise DataError(
            f"shard {index.path} of source {name!r} has no {modality} files, only "
            f"{', '.join(index.extensions)}: correct its shards or its modality"
        )
    return source


def make_cache(data: DataConfig) -> ShardCache:
    """Return the cache of remote shards that a config sets."""
    folder = Path(os.path.expanduser(data.cache)) if data.cache else user_cache("shards")
    return ShardCache(folder, int(data.cache_gb * 1e9), data.fetch_patience)


def check_same_on_all_ranks(sources: Mapping[str, Source]) -> None:
    """Raise DataError if hosts see different shards, because their plans would differ."""
    everyone = dist.gather_objects({name: source.digest for name, source in sources.items()})
    for name, source in sources.items():
        ranks = [rank for rank, digests in enumerate(everyone) if digests[name] != source.digest]
        if any(digests[name] != everyone[0][name] for digests in everyone):
            raise DataError(
                f"source {name!r} is not the same on all hosts (ranks {ranks[:4]} see different "
                f"shards than rank {dist.rank()}): make their copies of {source.manifest.folder} "
                "identical"
            )
