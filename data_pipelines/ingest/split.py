"""Copies shards into a part to train on and a part that is held out for validation.

The samples' files keep their bytes and names. Each tar becomes one tar in the folder and one in its
subfolder `val`, unless it has no sample there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.decode.near_duplicates import first_64
from data_pipelines.ingest.held_out import (
    VAL,
    Cut,
    Stratum,
    Traits,
    check_share,
    hold_out,
    traits_of,
)
from data_pipelines.ingest.recode import TEMPORARY
from data_pipelines.ingest.tar_writer import check_flat_names, flat_name, new_tar
from data_pipelines.shards.manifest import open_manifest
from data_pipelines.shards.process_pool import over_shards
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import Source, make_cache
from data_pipelines.shards.tar_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from data_pipelines.text.captions import metadata_of
from xray.config import DataConfig
from xray.errors import BadSample, ConfigError
from xray.files import replacing, sole_writer, write_text
from xray.progress import progress_of

RECORD = "split.json"


@dataclass
class SplitConfig:
    """Settings of a split."""

    val: float = 0.05  # share of the samples to hold out, above 0 and at most 0.5
    workers: int = 2  # processes
    cache: str = ""  # folder for remote shards; "" = the user's cache folder


@dataclass(frozen=True)
class SplitReport:
    """Content of the folder: shards and samples to train on, and samples in `val`."""

    shards: int
    samples: int
    held_out: int
    cut: Cut


def split(pattern: str, out: Path, config: SplitConfig) -> SplitReport:
    """Write the shards of a split that are missing; raises ConfigError or DataError.

    An interrupted split continues. The shards at `pattern` are not changed.
    """
    check_share(config.val)
    if not 1 <= config.workers <= 1024:
        raise ConfigError(f"workers={config.workers}: use 1 to 1024")
    cache = make_cache(DataConfig(cache=config.cache)) if is_remote(pattern) else None
    manifest = open_manifest(pattern, cache)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: choose a folder to write to")
    if out.resolve() == Path(manifest.folder).resolve():
        raise ConfigError(f"{out} has the shards to split: choose another folder to write to")
    check_flat_names(manifest.names)
    source = Source("split", "image", "image", manifest, cache)
    with sole_writer(out, "folder"):
        for path in (*out.glob(f"{TEMPORARY}*"), *out.glob(f"{VAL}/{TEMPORARY}*")):
            path.unlink(missing_ok=True)
        cut = _cut(out, source, config)
        (out / VAL).mkdir(exist_ok=True)
        sizes = [*_shown("splitting", _Writer(source, out, _by_shard(source, cut)), source, config)]
    trained, held = np.array(sizes).sum(axis=0).tolist()
    return SplitReport(len([*out.glob("*.tar")]), trained, held, cut)


def _cut(out: Path, source: Source, config: SplitConfig) -> Cut:
    """Choose the samples to hold out, once; raises ConfigError for a folder with other shards."""
    wanted = {"val": config.val, "shards": source.manifest.digest}
    if any(out.glob("*.tar")) or any(out.glob(f"{VAL}/*.tar")):
        try:
            recorded = json.loads((out / RECORD).read_text("utf-8"))
            if {key: recorded[key] for key in wanted} == wanted:
                return Cut(**recorded["held_out"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{out} contains .tar files that xray data split did not write: choose another "
                "folder"
            ) from error
        raise ConfigError(f"{out} contains another split: choose another folder or delete it")
    found = _shown("looking for near-duplicates", _Hasher(source), source, config)
    cut = hold_out([traits for shard in found for traits in shard], config.val)
    record = json.dumps({**wanted, "held_out": asdict(cut)}) + "\n"
    write_text(out / RECORD, record, out / f"{TEMPORARY}{RECORD}")
    return cut


def _by_shard(source: Source, cut: Cut) -> dict[int, list[int]]:
    """Return the members of each shard that are held out, ascending."""
    counts = [len(source.index(shard)) for shard in range(len(source.manifest))]
    starts = np.cumsum([0, *counts])
    held: dict[int, list[int]] = {}
    for number in cut.held:
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        held.setdefault(shard, []).append(number - int(starts[shard]))
    return held


def _shown(what: str, work: Any, source: Source, config: SplitConfig) -> Iterable[Any]:
    return over_shards(work, len(source.manifest), config.workers, progress_of(what))


@dataclass(frozen=True)
class _Hasher:
    """Function that hashes the samples of a shard; pickled to the worker processes."""

    source: Source

    def __call__(self, shard: int) -> list[Traits | None]:
        return [self._traits(shard, member) for member in range(len(self.source.index(shard)))]

    def _traits(self, shard: int, member: int) -> Traits | None:
        """Hash a sample; None if its picture or clip, or its json, cannot be read."""
        try:
            files = self.source.read(shard, member)
            meta = metadata_of(files)
            if "cls" in files:
                meta = {"label": files["cls"].decode("utf-8", "replace").strip(), **meta}
            media = next((e for e in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS) if e in files), "")
            if media:
                return traits_of(files[media], media, meta)
        except BadSample:
            return None
        digest = hashlib.sha256(b"\0".join(files[ending] for ending in sorted(files)))
        return Traits(first_64(digest.digest()), 0, Stratum("text"))


@dataclass(frozen=True)
class _Writer:
    """Function that writes both parts of a shard; pickled to the worker processes."""

    source: Source
    out: Path
    held: dict[int, list[int]]  # members by shard, ascending

    def __call__(self, shard: int) -> tuple[int, int]:
        """Write the parts that are missing; return the numbers of their samples."""
        held = self.held.get(shard, [])
        count = len(self.source.index(shard))
        parts = [member for member in range(count) if member not in set(held)], held
        name = flat_name(self.source.manifest.name(shard))
        for folder, members in zip((self.out, self.out / VAL), parts, strict=True):
            target = folder / name
            if members and not target.is_file():  # readers refuse a tar without samples
                self._write(target, shard, members)
        return len(parts[0]), len(parts[1])

    def _write(self, target: Path, shard: int, members: list[int]) -> None:
        temporary = target.with_name(f"{TEMPORARY}{target.name}.{os.getpid()}")
        with replacing(target, temporary), new_tar(temporary) as add:
            for member in members:
                key = self.source.index(shard).safe_key(member)
                add(key, self.source.read(shard, member))
