"""The labels of a source's samples: its own tags, those a teacher agrees with or adds.

They are a sidecar: per member the ids of the vocabulary and their weights, 1 for a tag of the
sample's own, `pseudo_weight` x the teacher's probability for one that the teacher adds. Workers
read rows of it; nothing is parsed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.columns import Columns, open_first, save_columns
from data_pipelines.shards.process_pool import Progress
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
from xray.errors import DataError

# Of a teacher's sidecar: tags, their probabilities, and whether the teacher would add the tag; a
# sample's own tags are there whatever their probability. In its totals, `prior` is the mean
# probability of each tag.
TEACHER_COLUMNS = ("ids", "scores", "chosen")
RAREST = 1e-12  # mean probability: no division by 0


def teacher_sidecar(
    name: str, source: Source, origin: Origin, field: str, captions: Mapping[str, float]
) -> str:
    """The sidecar of a teacher for what a source is of its shards, and for its own tags."""
    where = field if origin == "hashtags" else dict(captions)
    own = hash_json([source.modality, source.animations, origin, where])
    return f"{name}-{own[:8]}"


@dataclass(frozen=True)
class TeacherRules:
    """What is made of a teacher's probabilities.

    min_lift: a sample's own tag is dropped where the teacher finds it less probable than this many
    times its mean over all samples; 0 = all are kept. pseudo_weight: of the tags that the teacher
    adds to samples without any; 0 = none are added.
    """

    min_lift: float = 0.0
    pseudo_weight: float = 0.0


@dataclass(frozen=True)
class Labeller:
    """Labels of a shard; sent to the processes that make them."""

    source: Source
    origin: Origin
    rules: TagRules
    vocabulary: Vocabulary
    teacher: Sidecar | None = None
    use: TeacherRules = TeacherRules()
    captions: Mapping[str, float] = field(default_factory=dict)  # json fields of the captions

    def __call__(self, shard: int) -> Columns:
        rows, ids, weights = self._own(shard), [], []
        for member, own in enumerate(rows):
            found, weight = self._judged(shard, member, own)
            ids.append(found)
            weights.append(weight)
        packed, ends = pack_rows(ids, np.int32)
        return {"ids": packed, "weights": pack_rows(weights, np.float32)[0], "ends": ends}

    def _own(self, shard: int) -> list[np.ndarray]:
        """The tags of every member of the index; none where it is of another modality."""
        rows = [np.empty(0, np.int32)] * len(self.source.index(shard))
        for member in self.source.members(shard).tolist():
            try:
                files = self.source.read(shard, member, TEXT_FILES)
                tags = self._reader.tags_of(files, self.origin, self.captions)
            except BadSample:
                continue
            rows[member] = np.array(self.vocabulary.encode(tags), np.int32)
        return rows

    def _judged(self, shard: int, member: int, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids, weights) once the teacher was heard."""
        weights = np.ones(len(own), np.float32)
        if self.teacher is None:
            return own, weights
        row = {name: self.teacher.row(shard, member, name) for name in TEACHER_COLUMNS}
        if len(own) and self.use.min_lift:
            lift = row["scores"] / np.maximum(self.teacher.totals["prior"][row["ids"]], RAREST)
            agreed = np.isin(own, row["ids"][lift >= self.use.min_lift])
            own, weights = own[agreed], weights[agreed]
        if not len(own) and self.use.pseudo_weight:
            chosen = row["chosen"] > 0
            return row["ids"][chosen], self.use.pseudo_weight * row["scores"][chosen]
        return own, weights

    @functools.cached_property
    def _reader(self) -> TagReader:
        return self.vocabulary.reader(self.rules)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_reader"}


def label(work: Labeller, workers: int = 1, progress: Progress | None = None) -> Sidecar:
    """The labels of a source, from its sidecar where that was made with the same settings."""
    teacher = work.teacher.digest if work.teacher is not None else ""
    vocabulary = work.vocabulary.digest
    use = asdict(work.use) if teacher else {}
    facts = {
        "vocabulary": vocabulary,
        "tags": work.origin,
        "field": work.rules.field,
        "captions": dict(work.captions),
        "teacher": teacher,
        "use": use,
        "modality": [work.source.modality, work.source.animations],
        "slots": work.source.slots.digest if work.source.slots is not None else "",
    }
    name = f"labels-{hash_json({**facts, 'manifest': work.source.manifest.digest})[:12]}"
    found = open_sidecar(work.source, name)
    return found or write_sidecar(work.source, name, work, facts, workers, progress)


@dataclass(frozen=True)
class LabelCounts:
    """own: samples with tags of their own, `tags` in all. taught: those with a teacher's."""

    own: int
    tags: int
    taught: int


def count_labels(labels: Sidecar) -> LabelCounts:
    """What labels are there; a tag of a sample's own weighs 1, a teacher's less."""
    own = tags = samples = 0
    for shard in range(len(labels.counts)):
        table = labels.table(shard)
        sure = np.concatenate([[0], np.cumsum(table["weights"] == 1)])
        of_rows = np.diff(sure[np.concatenate([[0], table["ends"]])])
        samples += int((np.diff(table["ends"], prepend=0) > 0).sum())
        own, tags = own + int((of_rows > 0).sum()), tags + int(of_rows.sum())
    return LabelCounts(own, tags, samples - own)


@dataclass(frozen=True)
class Balanced:
    """A source whose slots repeat samples with rare tags.

    counts: samples per tag, [V]. unique, slots: samples with labels, and places of an epoch.
    """

    source: Source
    labels: Sidecar
    replication: Replication
    counts: np.ndarray
    unique: int
    seed: int

    @property
    def slots(self) -> int:
        return len(self.source)

    @property
    def frequency(self) -> np.ndarray:
        """The share of slots that each tag is seen in, [V], in (0, 1)."""
        return _share(self.counts * self.replication.factors, self.slots)

    def labels_of(
        self, shard: int, member: int, copy: int, strip: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, weights) of a copy of a sample."""
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
) -> Balanced:
    """Give a source's labelled samples their slots, an epoch of about `length` times their number.

    Raises DataError where no sample has a label.
    """
    counts, rarest = _counted(labels, tags)
    unique = int(rarest.sum())
    if not unique:
        raise DataError(
            f"source {source.name!r} has no sample with a tag of the vocabulary: say where its "
            f"tags are, data.sources.{source.name}.tags=caption_words, say"
        )
    found, threshold = replication(counts, rarest, balance, length)
    facts = {
        "labels": labels.digest,
        "balance": balance,
        "threshold": threshold,
        "seed": seed,
    }
    name = f"slots-{hash_json(facts)[:12]}"
    sidecar = open_sidecar(source, name) or write_sidecar(
        source, name, _SlotWriter(source, labels, found, seed), facts, workers
    )
    return Balanced(source.with_slots(CopySlots(sidecar)), labels, found, counts, unique, seed)


def tag_frequency(labels: Sidecar, tags: int) -> np.ndarray:
    """The share of the labelled samples that has each tag, [V], in (0, 1)."""
    counts, rarest = _counted(labels, tags)
    return _share(counts, int(rarest.sum()))


def _share(seen: np.ndarray, of: int) -> np.ndarray:
    """Never 0 or 1, whatever is never or always seen (Laplace's rule with a half)."""
    return np.minimum(seen + 0.5, of + 0.5) / (of + 1)


def mean_frequency(blocks: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """That of blocks of so many samples and their frequencies, [V]."""
    return np.average([own for _, own in blocks], axis=0, weights=[n for n, _ in blocks])


def _counted(labels: Sidecar, tags: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples per tag, and by their rarest tag, [V] each; kept beside the labels."""
    name, facts = f"{labels.name}-counts", {"labels": labels.digest}
    kept, _ = open_first(labels.source.derived_at(name), facts)
    if kept:
        return kept["counts"], kept["rarest"]
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


@dataclass(frozen=True)
class _SlotWriter:
    source: Source
    labels: Sidecar
    replication: Replication
    seed: int

    def __call__(self, shard: int) -> Columns:
        table, size = self.labels.table(shard), len(self.source.index(shard))
        u = np.array([uniform(self.seed, self.source.identity(shard, m)) for m in range(size)])
        members, copies = slots_of(self.replication.copies(table["ids"], table["ends"], u))
        return {"members": members, "copies": copies}
