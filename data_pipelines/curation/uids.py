"""Subsets of DataComp (2304.14108): a list of uids selects the samples of a source.

The list is a .npy file with the dtype `u8,u8`: the first and the last 16 hex digits of each uid, in
ascending order. A sample has its uid in its json, as `uid`. A uid that the list has k times gives
its sample k places in an epoch, as DataComp's own tool writes such a sample k times.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.ingest.labelled import place_of
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.process_pool import over_shards
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.sidecar import (
    CopySlots,
    Sidecar,
    finish_sidecar,
    open_sidecar,
    save_table,
    saved_table,
)
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import metadata_of
from xray.config.identity import hash_json
from xray.errors import BadSample, ConfigError
from xray.files import NPY_DAMAGE, sha256_file
from xray.progress import log_once, progress_of
from xray.words import count

UID = np.dtype("u8,u8")
DIGITS = re.compile(r"([0-9a-fA-F]{16})([0-9a-fA-F]{16})")  # of a uid
BLOCK = 1 << 22  # uids of a list in memory at a time
TOTALS = ("listed", "found", "kept", "samples", "unnamed")


def is_uid_list(keep: str) -> bool:
    """Return True for a source's `keep` that names a list of uids."""
    return keep.endswith(".npy")


def keep_uids(source: Source, keep: str, root: str = "", workers: int = 1) -> Source:
    """Restrict a source to the samples of a list of uids, and log how many there are.

    keep: path of the list, relative to `root` or to the working folder. The places are made once,
    and stored beside the shards. Raises ConfigError for a file that is no such list, or that names
    no sample of the source.
    """
    key = f"data.sources.{source.name}.keep"
    path = Path(place_of(key, keep, "" if is_remote(root) else root))
    digest = _checked(path, f"{key}={keep}", _state(path, f"{key}={keep}"))
    name = f"uids-{hash_json([digest, source.digest])[:12]}"
    kept = open_sidecar(source, name) or _make(source, name, path, digest, workers)
    listed, found, samples, of, unnamed = (int(kept.totals[key][0]) for key in TOTALS)
    line = f"{samples:,} of {count(of, 'sample')} are kept"
    if int(kept.counts.sum()) != samples:
        line += f", {kept.counts.sum():,} times in all"
    line += f"; {listed - found:,} of {count(listed, 'uid')} of the list are not in the shards"
    if unnamed:
        line += f"; {count(unnamed, 'sample')} without a uid in the json"
    if not samples:
        raise ConfigError(f"{key}={keep}: {line}: give the list of these shards' pool")
    log_once(f"{key}={keep}: {line}")
    return source.with_slots(CopySlots(kept))


def _state(path: Path, what: str) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _checked(path: Path, what: str, state: tuple[int, int]) -> str:
    """Check a list of uids, and return the sha256 of its file; raises ConfigError.

    state: size and time of the file, after whose change it is read again.
    """
    try:
        uids = np.lib.format.open_memmap(path, mode="r")
    except (OSError, *NPY_DAMAGE) as error:  # a pickle, or another file
        raise ConfigError(f"{what} is no .npy file with uids of dtype u8,u8") from error
    if uids.dtype != UID or uids.ndim != 1:
        found = f"{uids.dtype} {list(uids.shape)}"
        raise ConfigError(f"{what} holds {found}: it must be a list of uids of dtype u8,u8")
    if not len(uids):
        raise ConfigError(f"{what} is empty: it has no uids")
    if any(falls.any() for falls, _ in _steps(uids)):
        raise ConfigError(
            f"{what}: the uids are not in ascending order: sort them, as in numpy.sort(uids)"
        )
    return sha256_file(path)


def _steps(uids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for blocks of neighbours in a list, which of them fall and which of them rise."""
    for start in range(0, len(uids), BLOCK):
        part = np.array(uids[start : start + BLOCK + 1])
        (high, next_high), (low, next_low) = ((part[f][:-1], part[f][1:]) for f in ("f0", "f1"))
        same = high == next_high
        yield (
            (high > next_high) | (same & (low > next_low)),
            ((high < next_high) | (same & (low < next_low))),
        )


@dataclass(frozen=True)
class UidMatcher:
    """Function that finds the samples of a shard in a list of uids; pickled to the workers.

    Columns of the table: members [k] int32 and copies [k] int32, a row for each place in an epoch;
    places [k] int64, of the first of the equal uids in the list; read [2] int64, (samples, samples
    without a uid).
    """

    source: Source
    path: Path

    def __call__(self, shard: int) -> Columns:
        members = np.unique(self.source.members(shard))
        known, uids = [], []
        for member in members.tolist():
            if (uid := self._uid(shard, member)) is not None:
                known.append(member)
                uids.append(uid)
        wanted = np.array(uids, UID)
        first, last = (np.searchsorted(self._list, wanted, side) for side in ("left", "right"))
        times = last - first
        starts = np.repeat(np.cumsum(times) - times, times)
        return {
            "members": np.repeat(np.array(known, np.int32), times),
            "copies": (np.arange(times.sum()) - starts).astype(np.int32),
            "places": np.repeat(first, times).astype(np.int64),
            "read": np.array([len(members), len(members) - len(known)], np.int64),
        }

    def _uid(self, shard: int, member: int) -> tuple[int, int] | None:
        """Return both halves of a sample's uid; None if its json has none."""
        try:
            uid = metadata_of(self.source.read(shard, member, ("json",))).get("uid")
        except BadSample:
            return None
        digits = DIGITS.fullmatch(uid) if isinstance(uid, str) else None
        return (int(digits[1], 16), int(digits[2], 16)) if digits else None

    @functools.cached_property
    def _list(self) -> np.ndarray:
        uids: np.ndarray = np.lib.format.open_memmap(self.path, mode="r")
        return uids

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_list"}


def _make(source: Source, name: str, path: Path, digest: str, workers: int) -> Sidecar:
    """Write the places of a source's samples that a list names, and the totals."""
    work = functools.partial(_save, source, name, UidMatcher(source, path))
    shards = len(source.manifest)
    for _ in over_shards(work, shards, workers, progress_of(f"uids of {source.name}")):
        pass
    uids = np.lib.format.open_memmap(path, mode="r")
    found, totals = np.zeros(len(uids), bool), dict.fromkeys(TOTALS, 0)
    totals["listed"] = 1 + sum(int(rises.sum()) for _, rises in _steps(uids))
    written = Sidecar(source, name, {}, {})
    for shard in range(shards):
        table = written.table(shard)
        found[table["places"]] = True
        totals["kept"] += int((table["copies"] == 0).sum())
        totals["samples"] += int(table["read"][0])
        totals["unnamed"] += int(table["read"][1])
    totals["found"] = int(found.sum())
    columns = {key: np.array([value], np.int64) for key, value in totals.items()}
    return finish_sidecar(source, name, {"uids": digest}, columns)


def _save(source: Source, name: str, work: UidMatcher, shard: int) -> None:
    if saved_table(source, name, shard) is None:
        save_table(source, name, shard, work(shard))
