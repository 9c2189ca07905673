"""Decisions about the whole pool: leaks, duplicates and caps, on compact arrays of all samples.

Held are 4 bytes per sample, and for the step at work 8 bytes of hash per sample (or text) with
what sorting them takes, some 50 more; nothing where no such step is switched on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipelines.curation.balance import hash_texts, keyed, rows_of
from data_pipelines.curation.config import CurationConfig, DedupConfig
from data_pipelines.curation.dedup import components, groups_of, is_near, repeats, similar_pairs
from data_pipelines.curation.filters import EXAMPLES, Taken, within_cap
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.sidecar import Sidecar, open_sidecar
from data_pipelines.shards.source import Source
from data_pipelines.shards.utf8 import printable
from xray.errors import ConfigError


@dataclass
class Decision:
    """What the steps took, and samples of the pool per evaluation set: those with the same bytes,
    and those with the same or nearly the same picture."""

    steps: dict[str, Taken] = field(default_factory=dict)
    leaks: dict[str, dict[str, int]] = field(default_factory=dict)


class Pool:
    """The samples of all shards' tables in one row, [N], with their texts, [T]."""

    def __init__(self, source: Source, texts: Sidecar, seed: int) -> None:
        self.source, self.texts, self.seed = source, texts, seed
        self.ends = np.cumsum(texts.counts)  # of the shards, in samples
        shards = range(len(self.ends))
        self.text_ends = np.cumsum([len(self._table(shard)["texts"]) for shard in shards])
        self.sizes = self._original_sizes()  # texts that are left, [N]; 0 = the sample is dropped
        self._texts: np.ndarray | None = None  # [T] bool, where single texts were dropped
        self.decision = Decision()

    def _table(self, shard: int) -> Columns:
        return self.texts.table(shard)

    def _original_sizes(self) -> np.ndarray:
        def part(shard: int) -> np.ndarray:
            return np.diff(self._table(shard)["text_ends"], prepend=0)

        return _joined(part, self.ends, np.int32)

    def of_samples(self, name: str) -> np.ndarray:
        """A column of all tables, [N] int64."""
        return _joined(lambda shard: self._table(shard)[name], self.ends, np.int64)

    def of_texts(self, name: str) -> np.ndarray:
        """A column of all tables, [T] int64."""
        return _joined(lambda shard: self._table(shard)[name], self.text_ends, np.int64)

    def media(self, hashes: Sidecar, name: str) -> np.ndarray:
        """A column of the media's hashes, [N] int64."""

        def part(shard: int) -> np.ndarray:
            table, members = hashes.table(shard), self._table(shard)["members"]
            return table[name][np.searchsorted(table["members"], members)]

        return _joined(part, self.ends, np.int64)

    def key(self, place: int) -> str:
        shard, row = self.place(place)
        return printable(self.source.index(shard).key(int(self._table(shard)["members"][row])))

    def place(self, place: int) -> tuple[int, int]:
        """(shard, row of its table) of a sample."""
        shard = int(np.searchsorted(self.ends, place, side="right"))
        return shard, place - _own(self.ends, shard).start

    @property
    def left(self) -> np.ndarray:
        """Numbers of the samples that are left."""
        return np.flatnonzero(self.sizes)

    def drop(self, step: str, places: np.ndarray) -> None:
        """Drop samples that are left; a step that drops none is noted, too."""
        keys = [self.key(place) for place in places[:EXAMPLES].tolist()]
        texts = int(self.sizes[places].sum())
        self.decision.steps[step] = Taken(len(places), texts, keys=keys)
        self.sizes[places] = 0

    def keep_same_texts(self, most: int) -> None:
        """Leave at most so many texts that are equal, chosen by hash."""
        sample_of = np.repeat(np.arange(len(self.sizes)), self._original_sizes())
        left = np.flatnonzero(self.sizes[sample_of])
        samples = sample_of[left]
        hashes = self.of_samples("hashes").view(np.uint64)[samples]
        order = keyed(hashes, self.seed, self.of_texts("texts")[left])
        kept = within_cap(self.of_texts("same")[left], order, most)
        self._texts = np.zeros(len(sample_of), bool)
        self._texts[left[kept]] = True
        sizes = np.bincount(samples[kept], minlength=len(self.sizes))
        gone = np.flatnonzero((self.sizes > 0) & (sizes == 0))
        keys = [self.key(place) for place in gone[:EXAMPLES].tolist()]
        self.decision.steps["same_text"] = Taken(len(gone), int((~kept).sum()), keys=keys)
        self.sizes = sizes.astype(np.int32)

    def table(self, shard: int) -> Columns:
        """What is left of a shard: members [k] int32, and texts [T] uint8, 1 = left."""
        table = self._table(shard)
        alive = self.sizes[_own(self.ends, shard)] > 0
        texts = alive[rows_of(table["text_ends"])]
        if self._texts is not None:
            texts = texts & self._texts[_own(self.text_ends, shard)]
        return {"members": table["members"][alive], "texts": texts.astype(np.uint8)}


def _own(ends: np.ndarray, shard: int) -> slice:
    return slice(int(ends[shard - 1]) if shard else 0, int(ends[shard]))


def _joined(part: Callable[[int], np.ndarray], ends: np.ndarray, dtype: Any) -> np.ndarray:
    """part(shard) of all shards; no more than one of them is held open."""
    whole = np.empty(int(ends[-1]), dtype)
    for shard in range(len(ends)):
        whole[_own(ends, shard)] = part(shard)
    return whole


def decide(
    pool: Pool,
    config: CurationConfig,
    hashes: Sidecar | None,
    evaluation: Mapping[str, Sidecar],
) -> Decision:
    """Drop leaks, then duplicates, then what is beyond the caps."""
    dedup, filters = config.dedup, config.filters
    if hashes is not None:
        left = pool.left
        pool.drop("undecodable", left[pool.media(hashes, "broken")[left] > 0])
        if evaluation:
            _drop_leaks(pool, dedup, hashes, evaluation)
    if dedup.exact and hashes is not None:
        left = pool.left
        same = repeats(pool.media(hashes, "exact")[left], lambda place: pool.key(int(left[place])))
        pool.drop("exact duplicate", left[same])
    if dedup.perceptual and hashes is not None:
        looks = pool.media(hashes, "perceptual")
        seen = np.flatnonzero((pool.sizes > 0) & (looks != 0))  # 0 says nothing
        groups = groups_of(looks[seen], dedup.distance)
        same = repeats(groups, lambda place: pool.key(int(seen[place])))
        pool.drop("perceptual duplicate", seen[same])
    if dedup.embeddings:
        _drop_similar(pool, dedup, config.seed)
    if filters.same_text:
        pool.keep_same_texts(filters.same_text)
    if filters.per_field:
        values = pool.of_samples("values")
        if (values == hash_texts([""])[0]).all():
            raise ConfigError(
                f"filters.per_field={filters.per_field}: no sample's json has such a field"
            )
        left = pool.left[values[pool.left] != hash_texts([""])[0]]  # without one, nothing is shared
        samples = pool.of_samples("hashes").view(np.uint64)[left]
        order = keyed(samples, config.seed, np.zeros(len(left)))
        pool.drop("per_value", left[~within_cap(values[left], order, filters.per_value)])
    return pool.decision


def _drop_leaks(
    pool: Pool, dedup: DedupConfig, hashes: Sidecar, evaluation: Mapping[str, Sidecar]
) -> None:
    """Drop what is in an evaluation set, and count it by set."""
    exact, looks = pool.media(hashes, "exact"), pool.media(hashes, "perceptual")
    leaked, left = np.zeros(len(pool.sizes), bool), pool.left
    for name, theirs in evaluation.items():
        tables = [theirs.table(shard) for shard in range(len(theirs.counts))]
        sound = [table["broken"] == 0 for table in tables]
        of_set = {
            kind: np.concatenate([t[kind][whole] for t, whole in zip(tables, sound, strict=True)])
            for kind in ("exact", "perceptual")
        }
        same = np.isin(exact[left], of_set["exact"])
        seen = of_set["perceptual"][of_set["perceptual"] != 0]
        near = (looks[left] != 0) & is_near(looks[left], seen, dedup.distance)
        pool.decision.leaks[name] = {"exact": int(same.sum()), "perceptual": int(near.sum())}
        leaked[left[same | near]] = True
    pool.drop("in an evaluation set", np.flatnonzero(leaked))


def _drop_similar(pool: Pool, dedup: DedupConfig, seed: int) -> None:
    found = open_sidecar(pool.source, dedup.embeddings)
    if found is None or "embeddings" not in found.table(0):
        raise ConfigError(
            f"dedup.embeddings={dedup.embeddings}: {pool.source.manifest.folder} has no embeddings "
            "of that name; xray data embeddings makes them and prints it"
        )
    sidecar, left = found, pool.left

    def rows(places: np.ndarray) -> np.ndarray:
        return np.stack([_embedding(pool, sidecar, place) for place in left[places].tolist()])

    groups = components(len(left), similar_pairs(rows, len(left), dedup.cosine, seed))
    same = repeats(groups, lambda place: pool.key(int(left[place])))
    pool.drop("embedding duplicate", left[same])


def _embedding(pool: Pool, sidecar: Sidecar, place: int) -> np.ndarray:
    """A sample's row; one of zeros, which is like none, where it has none."""
    shard, row = pool.place(place)
    table, member = sidecar.table(shard), int(pool.texts.table(shard)["members"][row])
    at = int(np.searchsorted(table["members"], member))
    if at < len(table["members"]) and table["members"][at] == member:
        return table["embeddings"][at]
    return np.zeros(table["embeddings"].shape[1], np.float32)


def facts_of(decision: Decision) -> dict[str, Any]:
    """A decision as json holds it."""
    return asdict(decision)


def decision_in(facts: Mapping[str, Any]) -> Decision:
    """The decision that a sidecar's facts tell of."""
    return Decision({n: Taken(**taken) for n, taken in facts["steps"].items()}, facts["leaks"])
