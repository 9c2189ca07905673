"""Labels of the samples of a source: their tags, filtered or completed by a teacher model.

Labels are stored in a sidecar: for each member, the ids of its tags in the vocabulary, and their
weights. A tag from the data has weight 1. A tag that the teacher adds has weight `pseudo_weight`
times its probability. Loader workers read rows of the sidecar, so tags are parsed only once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipelines.shards.columns import Columns, open_first, save_columns
from data_pipelines.shards.sidecar import CopySlots, Sidecar, open_sidecar, pack_rows, write_sidecar
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.tags.balance import (
    Balance,
    Replication,
    rarest_of,
    replication,
    slots_of,
    uniform,
)
from data_pipelines.tags.reader import Origin, TagReader, TagRules
from data_pipelines.tags.vocabulary import Vocabulary
from xray.config.identity import hash_json
from xray.errors import BadSample, DataError

# Columns of a teacher's sidecar: tag ids, their probabilities, and 1 for a tag that the teacher
# would add. The tags from the data are always included. `totals["prior"]` holds the mean
# probability of each tag over all samples.
TEACHER_COLUMNS = ("ids", "scores", "chosen")
MIN_PRIOR = 1e-12  # avoids a division by 0


def teacher_sidecar(
    name: str, source: Source, origin: Origin, field: str, captions: Mapping[str, float]
) -> str:
    """Return a sidecar's name: `name`, and a hash of the modality and of the fields of tags."""
    fields = field if origin == "hashtags" else dict(captions)
    digest = hash_json([source.modality, source.animations, origin, fields])
    return f"{name}-{digest[:8]}"


@dataclass(frozen=True)
class TeacherRules:
    """Rules for the use of a teacher's probabilities.

    min_lift: a tag from the data is dropped if its probability is below `min_lift` times the mean
    probability of this tag over all samples; 0 = keep all. pseudo_weight: weight of the tags that
    the teacher adds to samples without tags; 0 = add none.
    """

    min_lift: float = 0.0
    pseudo_weight: float = 0.0


@dataclass(frozen=True)
class Labeller:
    """Function that makes the labels of a shard; pickled to the worker processes."""

    source: Source
    origin: Origin
    rules: TagRules
    vocabulary: Vocabulary
    teacher: Sidecar | None = None
    use: TeacherRules = TeacherRules()
    captions: Mapping[str, float] = field(default_factory=dict)  # JSON fields of the captions

    def __call__(self, shard: int) -> Columns:
        tags = enumerate(self._tags_of_members(shard))
        rows = [self._apply_teacher(shard, member, own) for member, own in tags]
        ids, weights = [ids for ids, _ in rows], [weights for _, weights in rows]
        packed, ends = pack_rows(ids, np.int32)
        return {"ids": packed, "weights": pack_rows(weights, np.float32)[0], "ends": ends}

    def _tags_of_members(self, shard: int) -> list[np.ndarray]:
        """Read the tag ids of each member of a shard; none for members of another modality."""
        rows = [np.empty(0, np.int32)] * len(self.source.index(shard))
        for member in self.source.members(shard).tolist():
            try:
                files = self.source.read(shard, member, TEXT_FILES)
                tags = self._reader.tags_of(files, self.origin, self.captions)
            except BadSample:
                continue
            rows[member] = np.array(self.vocabulary.encode(tags), np.int32)
        return rows

    def _apply_teacher(
        self, shard: int, member: int, tags: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, weights) after the teacher has dropped or added tags."""
        weights = np.ones(len(tags), np.float32)
        if self.teacher is None:
            return tags, weights
        row = {name: self.teacher.row(shard, member, name) for name in TEACHER_COLUMNS}
        if len(tags) and self.use.min_lift:
            lift = row["scores"] / np.maximum(self.teacher.totals["prior"][row["ids"]], MIN_PRIOR)
            agreed = np.isin(tags, row["ids"][lift >= self.use.min_lift])
            tags, weights = tags[agreed], weights[agreed]
        if not len(tags) and self.use.pseudo_weight:
            chosen = row["chosen"] > 0
            return row["ids"][chosen], self.use.pseudo_weight * row["scores"][chosen]
        return tags, weights

    @functools.cached_property
    def _reader(self) -> TagReader:
        return self.vocabulary.reader(self.rules)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_reader"}


def label(work: Labeller, workers: int = 1) -> Sidecar:
    """Make the labels of a source, or open the sidecar if it exists with the same settings."""
    teacher = work.teacher.digest if work.teacher is not None else ""
    facts = {
        "vocabulary": work.vocabulary.digest,
        "tags": work.origin,
        "field": work.rules.field,
        "captions": dict(work.captions),
        "teacher": teacher,
        "use": asdict(work.use) if teacher else {},
        "modality": [work.source.modality, work.source.animations],
        "slots": work.source.slots.digest if work.source.slots is not None else "",
    }
    name = f"labels-{hash_json({**facts, 'manifest': work.source.manifest.digest})[:12]}"
    labels = open_sidecar(work.source, name)
    return labels or write_sidecar(work.source, name, work, facts, workers)


@dataclass(frozen=True)
class LabelCounts:
    """Numbers of labelled samples."""

    own: int  # samples with tags from the data
    tags: int  # number of those tags
    pseudo_labelled: int  # samples whose tags all come from the teacher


def count_labels(labels: Sidecar) -> LabelCounts:
    """Count labelled samples. Tags from the data have weight 1, tags from the teacher less."""
    own = tags = samples = 0
    for shard in range(len(labels.counts)):
        table = labels.table(shard)
        cumulated = np.concatenate([[0], np.cumsum(table["weights"] == 1)])
        own_tags = np.diff(cumulated[np.concatenate([[0], table["ends"]])])  # per sample
        samples += int((np.diff(table["ends"], prepend=0) > 0).sum())
        own, tags = own + int((own_tags > 0).sum()), tags + int(own_tags.sum())
    return LabelCounts(own, tags, samples - own)


def most_labels(labels: Sidecar) -> int:
    """Return the largest number of labels of a sample."""
    sizes = (np.diff(ends, prepend=0) for _, ends in _rows(labels))
    return max((int(size.max(initial=0)) for size in sizes), default=0)


@dataclass(frozen=True)
class BalancedSource:
    """Source whose slots repeat samples with rare tags."""

    source: Source
    labels: Sidecar
    replication: Replication
    counts: np.ndarray  # samples with each tag, [V]
    unique: int  # number of labelled samples
    seed: int

    @property
    def slots(self) -> int:
        """Number of slots in an epoch."""
        return len(self.source)

    def frequency(self, strip: bool) -> np.ndarray:
        """Return the share of the slots that have each tag, [V], in (0, 1); strip: as below."""
        if strip:
            return _share(self.counts * self.replication.factors, self.slots)
        seen = np.zeros(len(self.counts))
        for shard, (ids, ends) in enumerate(_rows(self.labels)):
            copies = np.bincount(self.source.members(shard), minlength=len(ends))
            seen += np.bincount(ids, np.repeat(copies, np.diff(ends, prepend=0)), len(seen))
        return _share(seen, self.slots)

    def labels_of(
        self, shard: int, member: int, copy: int, strip: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, weights) of a copy of a sample; strip: without the tags this copy drops."""
        ids, weights = (self.labels.row(shard, member, name) for name in ("ids", "weights"))
        if strip and copy:
            u = uniform(self.seed, self.source.identity(shard, member))
            kept = self.replication.kept(ids, u, copy)
            ids, weights = ids[kept], weights[kept]
        return ids, weights


def balanced(
    source: Source,
    labels: Sidecar,
    tags: int,
    balance: Balance,
    length: float,
    seed: int,
    workers: int = 1,
    why_none: Callable[[], str] = str,
) -> BalancedSource:
    """Make about `length` slots per labelled sample; raises DataError if no sample has labels.

    why_none: explains in the error that no sample has one.
    """
    counts, rarest = _tag_counts(labels, tags)
    unique = int(rarest.sum())
    if not unique:
        raise DataError(
            f"source {source.name!r} has no sample with a tag of the vocabulary: {why_none()}"
        )
    factors, threshold = replication(counts, rarest, balance, length)
    facts = {"labels": labels.digest, "balance": balance, "threshold": threshold, "seed": seed}
    name = f"slots-{hash_json(facts)[:12]}"
    work = functools.partial(_slots, source, labels, factors, seed)
    sidecar = open_sidecar(source, name) or write_sidecar(source, name, work, facts, workers)
    return BalancedSource(
        source.with_slots(CopySlots(sidecar)), labels, factors, counts, unique, seed
    )


def tag_frequency(labels: Sidecar, tags: int) -> np.ndarray:
    """Return the share of the labelled samples that have each tag, [V], in (0, 1)."""
    counts, rarest = _tag_counts(labels, tags)
    return _share(counts, int(rarest.sum()))


def _share(counts: np.ndarray, total: int) -> np.ndarray:
    """Estimate shares in (0, 1), never 0 or 1 (additive smoothing with 1/2)."""
    return np.minimum(counts + 0.5, total + 0.5) / (total + 1)


def mean_frequency(blocks: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """Average tag frequencies [V] over blocks, given as (samples, frequencies)."""
    frequencies = [frequency for _, frequency in blocks]
    return np.average(frequencies, axis=0, weights=[samples for samples, _ in blocks])


def _tag_counts(labels: Sidecar, tags: int) -> tuple[np.ndarray, np.ndarray]:
    """Count, for each tag, the samples that have it, and those whose rarest tag it is, [V].

    The counts are saved beside the labels.
    """
    name, facts = f"{labels.name}-counts", {"labels": labels.digest}
    saved, _ = open_first(labels.source.derived_at(name), facts)
    if saved:
        return saved["counts"], saved["rarest"]
    counts, rarest = np.zeros(tags, np.int64), np.zeros(tags, np.int64)
    for ids, _ in _rows(labels):
        counts += np.bincount(ids, minlength=tags)
    for ids, ends in _rows(labels):
        rarest += np.bincount(rarest_of(ids, ends, counts), minlength=tags)
    save_columns(labels.source.derived(name), {"counts": counts, "rarest": rarest}, facts)
    return counts, rarest


def _rows(labels: Sidecar) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for shard in range(len(labels.counts)):
        table = labels.table(shard)
        yield table["ids"], table["ends"]


def _slots(source: Source, labels: Sidecar, factors: Replication, seed: int, shard: int) -> Columns:
    table, size = labels.table(shard), len(source.index(shard))
    u = np.array([uniform(seed, source.identity(shard, member)) for member in range(size)])
    members, copies = slots_of(factors.copies(table["ids"], table["ends"], u))
    return {"members": members, "copies": copies}
