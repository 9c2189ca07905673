"""Decisions about the whole pool: leaks, duplicates and caps, on compact arrays of all samples.

Memory: 4 bytes per sample. The step in progress also needs a hash of 8 bytes per sample (or text)
and about 50 bytes to sort it. Without such steps, no pool is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines.curation.balance import derive_keys, hash_texts, rows_of
from data_pipelines.curation.config import CurationConfig, DedupConfig
from data_pipelines.curation.dedup import mark_duplicates, similar_pairs
from data_pipelines.curation.filters import EXAMPLES, Taken, within_cap
from data_pipelines.decode.near_duplicates import components, groups_of, is_near
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.sidecar import Sidecar, open_sidecar
from data_pipelines.shards.source import Source
from xray.errors import ConfigError
from xray.files import printable


@dataclass
class Decision:
    """Samples dropped by each step, and numbers of leaked samples per evaluation set."""

    steps: dict[str, Taken] = field(default_factory=dict)
    leaks: dict[str, dict[str, int]] = field(default_factory=dict)  # set -> exact, perceptual


class Pool:
    """All samples of a pool as arrays [N], with all their texts [T], in shard order."""

    def __init__(self, source: Source, texts: Sidecar, seed: int) -> None:
        self.source, self.texts, self.seed = source, texts, seed
        self._table = texts.table
        self.ends = np.cumsum(texts.counts)  # end of each shard in the samples, [S]
        shards = range(len(self.ends))
        self.text_ends = np.cumsum([len(self._table(shard)["texts"]) for shard in shards])
        self.sizes = self._original_sizes()  # texts left per sample, [N]; 0 = sample is dropped
        self._texts: np.ndarray | None = None  # [T] bool, True = left; None = no text was dropped
        self.decision = Decision()

    def _original_sizes(self) -> np.ndarray:
        """Return the number of texts per sample before any step, [N]."""

        def part(shard: int) -> np.ndarray:
            return np.diff(self._table(shard)["text_ends"], prepend=0)

        return _joined(part, self.ends, np.int32)

    def sample_column(self, name: str) -> np.ndarray:
        """Read a column with a value per sample, [N] int64."""
        return _joined(lambda shard: self._table(shard)[name], self.ends, np.int64)

    def text_column(self, name: str) -> np.ndarray:
        """Read a column with a value per text, [T] int64."""
        return _joined(lambda shard: self._table(shard)[name], self.text_ends, np.int64)

    def media(self, hashes: Sidecar, name: str) -> np.ndarray:
        """Read a column of the hashes of the media, [N] int64."""

        def part(shard: int) -> np.ndarray:
            table, members = hashes.table(shard), self._table(shard)["members"]
            return table[name][np.searchsorted(table["members"], members)]

        return _joined(part, self.ends, np.int64)

    def key(self, sample: int) -> str:
        """Return the key of a sample, in printable form."""
        shard, row = self.locate(sample)
        return printable(self.source.index(shard).key(int(self._table(shard)["members"][row])))

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (shard, row in its table) of a sample."""
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        return shard, sample - _shard_slice(self.ends, shard).start

    @property
    def left(self) -> np.ndarray:
        """Numbers of the samples that are left."""
        return np.flatnonzero(self.sizes)

    def drop(self, step: str, samples: np.ndarray) -> None:
        """Drop the given remaining samples; record the step even if it drops none."""
        keys = [self.key(sample) for sample in samples[:EXAMPLES].tolist()]
        texts = int(self.sizes[samples].sum())
        self.decision.steps[step] = Taken(len(samples), texts, keys=keys)
        self.sizes[samples] = 0

    def drop_duplicates(self, kind: str, samples: np.ndarray, groups: np.ndarray) -> None:
        """Drop all samples of each group, [n], but the one with the smallest key."""
        duplicate = mark_duplicates(groups, lambda position: self.key(int(samples[position])))
        self.drop(f"{kind} duplicate", samples[duplicate])

    def keep_same_texts(self, most: int) -> None:
        """Keep at most `most` copies of each text, chosen by hash."""
        sample_of = np.repeat(np.arange(len(self.sizes)), self._original_sizes())
        left = np.flatnonzero(self.sizes[sample_of])
        samples = sample_of[left]
        hashes = self.sample_column("hashes").view(np.uint64)[samples]
        order = derive_keys(hashes, self.seed, self.text_column("texts")[left])
        kept = within_cap(self.text_column("same")[left], order, most)
        self._texts = np.zeros(len(sample_of), bool)
        self._texts[left[kept]] = True
        sizes = np.bincount(samples[kept], minlength=len(self.sizes))
        dropped = np.flatnonzero((self.sizes > 0) & (sizes == 0))
        keys = [self.key(sample) for sample in dropped[:EXAMPLES].tolist()]
        self.decision.steps["same_text"] = Taken(len(dropped), int((~kept).sum()), keys=keys)
        self.sizes = sizes.astype(np.int32)

    def table(self, shard: int) -> Columns:
        """Make the table of what is left: members [k] int32, and texts [T] uint8, 1 = left."""
        table = self._table(shard)
        samples_left = self.sizes[_shard_slice(self.ends, shard)] > 0
        texts = samples_left[rows_of(table["text_ends"])]
        if self._texts is not None:
            texts = texts & self._texts[_shard_slice(self.text_ends, shard)]
        return {"members": table["members"][samples_left], "texts": texts.astype(np.uint8)}


def _shard_slice(ends: np.ndarray, shard: int) -> slice:
    """Return the slice of a shard in an array over all shards that end at `ends`."""
    return slice(int(ends[shard - 1]) if shard else 0, int(ends[shard]))


def _joined(part: Callable[[int], np.ndarray], ends: np.ndarray, dtype: Any) -> np.ndarray:
    """Concatenate part(shard) of all shards, with one part in memory at a time."""
    result = np.empty(int(ends[-1]), dtype)
    for shard in range(len(ends)):
        result[_shard_slice(ends, shard)] = part(shard)
    return result


def decide(
    pool: Pool, config: CurationConfig, hashes: Sidecar | None, evaluation: Mapping[str, Sidecar]
) -> Decision:
    """Drop leaks, then duplicates, then texts and samples above the caps."""
    dedup, filters = config.dedup, config.filters
    if hashes is not None:
        left = pool.left
        pool.drop("undecodable", left[pool.media(hashes, "broken")[left] > 0])
        if evaluation:
            _drop_leaks(pool, dedup, hashes, evaluation)
    if dedup.exact and hashes is not None:
        left = pool.left
        pool.drop_duplicates("exact", left, pool.media(hashes, "exact")[left])
    if dedup.perceptual and hashes is not None:
        dhashes = pool.media(hashes, "perceptual")
        # A dHash of 0 means an image without gradients, which cannot be compared.
        left = np.flatnonzero((pool.sizes > 0) & (dhashes != 0))
        pool.drop_duplicates("perceptual", left, groups_of(dhashes[left], dedup.distance))
    if dedup.embeddings:
        _drop_similar(pool, dedup, config.seed)
    if filters.same_text:
        pool.keep_same_texts(filters.same_text)
    if filters.per_field:
        _cap_values(pool, filters.per_field, filters.per_value, config.seed)
    return pool.decision


def _cap_values(pool: Pool, field: str, most: int, seed: int) -> None:
    """Keep at most `most` samples per value of a JSON field, and all samples without the field."""
    values, missing = pool.sample_column("values"), hash_texts([""])[0]
    if (values == missing).all():
        raise ConfigError(f"filters.per_field={field}: no sample has this field in its JSON")
    left = pool.left[values[pool.left] != missing]
    hashes = pool.sample_column("hashes").view(np.uint64)[left]
    order = derive_keys(hashes, seed, np.zeros(len(left)))
    pool.drop("per_value", left[~within_cap(values[left], order, most)])


def _drop_leaks(
    pool: Pool, dedup: DedupConfig, hashes: Sidecar, evaluation: Mapping[str, Sidecar]
) -> None:
    """Drop samples that are in an evaluation set, and count them per set."""
    exact, dhashes = pool.media(hashes, "exact"), pool.media(hashes, "perceptual")
    leaked, left = np.zeros(len(pool.sizes), bool), pool.left
    for name, sidecar in evaluation.items():
        tables = [sidecar.table(shard) for shard in range(len(sidecar.counts))]
        eval_exact, eval_dhashes = (
            np.concatenate([table[kind][table["broken"] == 0] for table in tables])
            for kind in ("exact", "perceptual")
        )
        same = np.isin(exact[left], eval_exact)
        others = eval_dhashes[eval_dhashes != 0]
        near = (dhashes[left] != 0) & is_near(dhashes[left], others, dedup.distance)
        pool.decision.leaks[name] = {"exact": int(same.sum()), "perceptual": int(near.sum())}
        leaked[left[same | near]] = True
    pool.drop("in an evaluation set", np.flatnonzero(leaked))


def _drop_similar(pool: Pool, dedup: DedupConfig, seed: int) -> None:
    """Drop samples whose embeddings are similar to another sample's."""
    sidecar = open_sidecar(pool.source, dedup.embeddings)
    if sidecar is None or "embeddings" not in sidecar.table(0):
        raise ConfigError(
            f"dedup.embeddings={dedup.embeddings}: {pool.source.manifest.folder} has no embeddings "
            "of that name; make them with xray data embeddings, which prints their name"
        )
    embeddings, left = sidecar, pool.left

    def rows(positions: np.ndarray) -> np.ndarray:
        samples = left[positions].tolist()
        return np.stack([_embedding(pool, embeddings, sample) for sample in samples])

    groups = components(len(left), similar_pairs(rows, len(left), dedup.cosine, seed))
    pool.drop_duplicates("embedding", left, groups)


def _embedding(pool: Pool, sidecar: Sidecar, sample: int) -> np.ndarray:
    """Return the embedding of a sample, or zeros (similar to nothing) if it has none."""
    shard, row = pool.locate(sample)
    embeddings = sidecar.table(shard)["embeddings"]
    at = sidecar.find(shard, int(pool.texts.table(shard)["members"][row]))
    return np.zeros(embeddings.shape[1], np.float32) if at is None else embeddings[at]


def decision_in(facts: Mapping[str, Any]) -> Decision:
    """Read the decision from the facts of a sidecar."""
    return Decision({n: Taken(**taken) for n, taken in facts["steps"].items()}, facts["leaks"])
