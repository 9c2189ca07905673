"""Tables about the samples of a source that were derived from them: labels, scores, slots.

A sidecar has one file per shard, beside the shard's index (`SHARD.tar.NAME`), and a summary of all
(`shards-HASH.NAME`), which is written last: without it there is no sidecar. A shard's table is
either one row per member (`ends` says where each row ends in the other columns), or a list of
`members`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.shards.columns import Columns, open_first, save_columns
from data_pipelines.shards.process_pool import Progress, over_shards
from data_pipelines.shards.source import OPEN_INDEXES, Source
from xray.errors import DataError

VERSION = 1
Work = Callable[[int], Columns]  # a shard's table; pickled to the processes that make them


@dataclass(frozen=True)
class Sidecar:
    """The tables of a source's shards under one name.

    totals: columns about all shards, of which counts is one: rows per shard, [S] int64. facts: what
    it was made with.
    """

    source: Source
    name: str
    totals: Columns
    facts: Mapping[str, Any]

    @property
    def counts(self) -> np.ndarray:
        return self.totals["counts"]

    @property
    def digest(self) -> str:
        """sha256 over the content of all tables."""
        return self.facts["digest"]

    def table(self, shard: int) -> Columns:
        """A shard's columns, memory-mapped; raises DataError where they are of another shard."""
        return self._opened(shard)

    @functools.cached_property
    def _opened(self) -> functools._lru_cache_wrapper[Columns]:
        return functools.lru_cache(maxsize=OPEN_INDEXES)(self._open)

    def _open(self, shard: int) -> Columns:
        found = _load(self.source, self.name, shard)
        if found is None:
            path = self.source.derived(self.name, shard)
            raise DataError(
                f"{path} is missing, damaged or of another shard: the command that wrote it "
                "writes it again"
            )
        return found

    def row(self, shard: int, member: int, column: str) -> np.ndarray:
        """One member's part of a column."""
        table = self.table(shard)
        start = int(table["ends"][member - 1]) if member else 0
        return table[column][start : int(table["ends"][member])]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_opened"}


def open_sidecar(source: Source, name: str) -> Sidecar | None:
    """A source's sidecar, or None where there is none of these shards."""
    wanted = {"version": VERSION, "manifest": source.manifest.digest}
    columns, facts = open_first(source.derived_at(name), wanted)
    return Sidecar(source, name, columns, facts) if columns else None


def open_whole(source: Source, name: str) -> Sidecar | None:
    """A source's sidecar if all its tables are there, for whatever would write them again."""
    found = open_sidecar(source, name)
    shards = range(len(found.counts)) if found is not None else range(0)
    return found if all(_load(source, name, shard) is not None for shard in shards) else None


def write_sidecar(
    source: Source,
    name: str,
    work: Work,
    facts: Mapping[str, Any],
    workers: int = 1,
    progress: Progress | None = None,
) -> Sidecar:
    """Make the tables that are missing, then the summary; what was made before is kept.

    The name has to tell tables of different settings apart.
    """
    shards = len(source.manifest)
    found = over_shards(_Writer(source, name, work), shards, workers)
    return finish_sidecar(source, name, list(progress(found, shards) if progress else found), facts)


def save_table(source: Source, name: str, shard: int, columns: Columns) -> None:
    """Write one shard's table."""
    of = source.index(shard).facts["digest"]
    save_columns(source.derived(name, shard), columns, {"version": VERSION, "shard": of})


def saved_table(source: Source, name: str, shard: int) -> tuple[int, str] | None:
    """(rows, digest) of a shard's table, None where there is none."""
    columns = _load(source, name, shard)
    return None if columns is None else _size_and_digest(columns)


def finish_sidecar(
    source: Source,
    name: str,
    tables: Sequence[tuple[int, str]],
    facts: Mapping[str, Any],
    totals: Mapping[str, np.ndarray] | None = None,
) -> Sidecar:
    """Write the summary once all tables are there: (rows, digest) of each."""
    digests = "".join(digest for _, digest in tables)
    state = hashlib.sha256(digests.encode())
    columns = dict(totals or {})
    for key in sorted(columns):
        state.update(columns[key].tobytes())
    columns["counts"] = np.array([count for count, _ in tables], np.int64)
    manifest = {"version": VERSION, "manifest": source.manifest.digest}
    whole = {**facts, **manifest, "digest": state.hexdigest()}
    save_columns(source.derived(name), columns, whole)
    return Sidecar(source, name, columns, whole)


@dataclass(frozen=True)
class _Writer:
    source: Source
    name: str
    work: Work

    def __call__(self, shard: int) -> tuple[int, str]:
        """(rows, digest) of a shard's table."""
        found = saved_table(self.source, self.name, shard)
        if found is None:
            columns = self.work(shard)
            save_table(self.source, self.name, shard, columns)
            found = _size_and_digest(columns)
        return found


def _size_and_digest(columns: Columns) -> tuple[int, str]:
    state = hashlib.sha256()
    for key in sorted(columns):
        state.update(key.encode() + np.ascontiguousarray(columns[key]).tobytes())
    rows = columns["ends"] if "ends" in columns else columns["members"]
    return len(rows), state.hexdigest()


def _load(source: Source, name: str, shard: int) -> Columns | None:
    wanted = {"version": VERSION, "shard": source.index(shard).facts["digest"]}
    return open_first(source.derived_at(name, shard), wanted)[0] or None


class CopySlots:
    """Slots that repeat members: columns members and copies, by slot.

    Copy j of a member is its j-th repeat in the epoch, from 0.
    """

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self.counts, self.digest = sidecar.counts, sidecar.digest

    def of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(members, copies) of a shard's slots."""
        table = self.sidecar.table(shard)
        return table["members"], table["copies"]

    def texts(self, shard: int, slot: int) -> np.ndarray | None:
        """Numbers of the captions that a slot's sample is to be used with, None = all."""
        return None


def pack_rows(rows: list[np.ndarray], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as (values [total], ends [n])."""
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return np.concatenate([np.empty(0, dtype), *rows]).astype(dtype), ends
