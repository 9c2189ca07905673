"""Sidecars: tables derived from the samples of a source, such as labels, scores and slots.

A sidecar has one side file per shard (`SHARD.tar.NAME`) and one summary (`shards-HASH.NAME`). The
summary is written last, so a sidecar without a summary is incomplete and is ignored.

The table of a shard has one of two layouts. Either it has a row for every member, of any length;
then the column `ends` is the end of each row in the other columns. Or it has a row for some
members; then the column `members` is their numbers.
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
Work = Callable[[int], Columns]  # shard number -> its table; pickled once per worker process


@dataclass(frozen=True)
class Sidecar:
    """Tables of all shards of a source under one name."""

    source: Source
    name: str
    totals: Columns  # columns of the summary; `counts` holds the rows per shard, [S] int64
    facts: Mapping[str, Any]  # settings and digests that it was made with

    @property
    def counts(self) -> np.ndarray:
        """Rows per shard, [S] int64."""
        return self.totals["counts"]

    @property
    def digest(self) -> str:
        """Digest (sha256) of the content of all tables."""
        return self.facts["digest"]

    def table(self, shard: int) -> Columns:
        """Return the memory-mapped columns of a shard; raises DataError if they cannot be used."""
        return self._opened(shard)

    @functools.cached_property
    def _opened(self) -> functools._lru_cache_wrapper[Columns]:
        return functools.lru_cache(maxsize=OPEN_INDEXES)(self._open)

    def _open(self, shard: int) -> Columns:
        columns = _load(self.source, self.name, shard)
        if columns is None:
            path = self.source.derived(self.name, shard)
            raise DataError(
                f"{path} is missing, damaged or made from another shard: run the command that "
                "wrote it again"
            )
        return columns

    def row(self, shard: int, member: int, column: str) -> np.ndarray:
        """Return the values of one member in a column, for a table with one row per member."""
        table = self.table(shard)
        start = int(table["ends"][member - 1]) if member else 0
        return table[column][start : int(table["ends"][member])]

    def find(self, shard: int, member: int) -> int | None:
        """Return the row of a member in a table with rows for some members; None = no row."""
        members = self.table(shard)["members"]
        row = int(np.searchsorted(members, member))
        return row if row < len(members) and members[row] == member else None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_opened"}


def open_sidecar(source: Source, name: str) -> Sidecar | None:
    """Open the sidecar of a source by its name; None if it was not made from these shards."""
    wanted = {"version": VERSION, "manifest": source.manifest.digest}
    columns, facts = open_first(source.derived_at(name), wanted)
    return Sidecar(source, name, columns, facts) if columns else None


def open_whole(source: Source, name: str) -> Sidecar | None:
    """Open a sidecar if all its tables can be read, for commands that can rewrite lost ones."""
    sidecar = open_sidecar(source, name)
    shards = range(len(sidecar.counts)) if sidecar is not None else range(0)
    return sidecar if all(_load(source, name, shard) is not None for shard in shards) else None


def write_sidecar(
    source: Source,
    name: str,
    work: Work,
    facts: Mapping[str, Any],
    workers: int = 1,
    progress: Progress | None = None,
) -> Sidecar:
    """Write the missing tables, then the summary; different settings need different names."""
    write = functools.partial(_write_table, source, name, work)
    tables = over_shards(write, len(source.manifest), workers, progress)
    return finish_sidecar(source, name, facts, tables=list(tables))


def save_table(source: Source, name: str, shard: int, columns: Columns) -> None:
    """Write the table of one shard."""
    digest = source.index(shard).facts["digest"]
    save_columns(source.derived(name, shard), columns, {"version": VERSION, "shard": digest})


def saved_table(source: Source, name: str, shard: int) -> tuple[int, str] | None:
    """Return (rows, digest) of the saved table of a shard, or None if it has none."""
    columns = _load(source, name, shard)
    return None if columns is None else _size_and_digest(columns)


def finish_sidecar(
    source: Source,
    name: str,
    facts: Mapping[str, Any],
    totals: Mapping[str, np.ndarray] | None = None,
    tables: Sequence[tuple[int, str] | None] = (),
) -> Sidecar:
    """Write the summary of a sidecar; tables: (rows, digest) of each, if the caller knows them."""
    if not tables:
        tables = [saved_table(source, name, shard) for shard in range(len(source.manifest))]
    known = [table for table in tables if table is not None]
    state = hashlib.sha256("".join(digest for _, digest in known).encode())
    columns = dict(totals or {})
    for key in sorted(columns):
        state.update(columns[key].tobytes())
    columns["counts"] = np.array([count for count, _ in known], np.int64)
    manifest = {"version": VERSION, "manifest": source.manifest.digest}
    facts = {**facts, **manifest, "digest": state.hexdigest()}
    save_columns(source.derived(name), columns, facts)
    return Sidecar(source, name, columns, facts)


def _write_table(source: Source, name: str, work: Work, shard: int) -> tuple[int, str]:
    """Return (rows, digest) of the table of a shard, which is written if it is missing."""
    saved = saved_table(source, name, shard)
    if saved is not None:
        return saved
    columns = work(shard)
    save_table(source, name, shard, columns)
    return _size_and_digest(columns)


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
    """Slots from a sidecar with the columns `members` and `copies`, one row per slot.

    A member may have several slots in an epoch; `copies` numbers them from 0.
    """

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self.counts, self.digest = sidecar.counts, sidecar.digest

    def of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (members, copies) of the slots of a shard."""
        table = self.sidecar.table(shard)
        return table["members"], table["copies"]

    def texts(self, shard: int, slot: int) -> np.ndarray | None:
        """Return the numbers of the captions that a slot uses; None = all captions."""
        return None


def pack_rows(rows: list[np.ndarray], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate rows of different lengths to (values [total], ends [n] int64)."""
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return np.concatenate([np.empty(0, dtype), *rows]).astype(dtype), ends
