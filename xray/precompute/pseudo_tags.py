"""Pseudo-tags: a teacher's tags for samples, and its probabilities of the tags they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.shards.columns import Columns
from data_pipelines.shards.sidecar import Sidecar, open_whole, pack_rows
from data_pipelines.shards.source import Source
from data_pipelines.tags.labels import TEACHER_COLUMNS, Labeller, label, teacher_sidecar
from data_pipelines.tags.reader import TagRules
from data_pipelines.tags.vocabulary import Vocabulary
from xray import dist
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import Encoder, PromptTagger, Tagger
from xray.artifacts.offers import JOINT, TAGS
from xray.config import DataConfig
from xray.config.identity import hash_json
from xray.errors import ConfigError
from xray.models.inference import recorded
from xray.precompute.config import PseudoTagsConfig
from xray.precompute.inference import Place, Progress, cut, pixels_of, spread, write_from_model

TEACHING = ("top", "threshold", "temperature", "template")  # settings that identify a teacher
PRIOR_SAMPLES = 4096  # samples for a tag's mean probability
Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # TEACHER_COLUMNS
Teacher = Tagger | PromptTagger


@dataclass(frozen=True)
class PseudoTags:
    """Result: the number of untagged samples, how many of them got tags, and failures by cause.

    name: the value for `hashtag.teacher`.
    """

    name: str
    sidecar: Sidecar
    untagged: int
    added: int
    causes: Mapping[str, int]


def write_pseudo_tags(
    source: Source,
    teacher: Teacher,
    vocabulary: Vocabulary,
    config: PseudoTagsConfig,
    data: DataConfig,
    teacher_digest: str,
    progress: Progress | None = None,
) -> PseudoTags:
    """Write a teacher's probabilities of each sample's own and most probable tags as a sidecar.

    Its name is a hash of teacher, vocabulary and settings, the same for every source.
    """
    rules = TagRules(field=config.field)
    own = label(
        Labeller(source, config.tags, rules, vocabulary, captions=config.captions), config.workers
    )
    settings = {k: v for k, v in asdict(config).items() if k in TEACHING}
    settings |= recorded(config.precision)
    facts = {"vocabulary": vocabulary.digest, "settings": settings, "teacher": teacher_digest}
    name = f"teacher-{hash_json(facts)[:12]}"
    whole = teacher_sidecar(name, source, config.tags, config.field, config.captions)
    sidecar, causes = open_whole(source, whole), dict[str, int]()
    if sidecar is None:
        totals = {"prior": _prior(source, teacher, config, data)}
        job, run = _Job(teacher, own, config), (data, config.batch_size, progress)
        sidecar, causes = write_from_model(source, whole, job.run, job.pack, facts, totals, *run)
    untagged, added = _count(sidecar, own)
    return PseudoTags(name, sidecar, untagged, added, causes)


def _prior(
    source: Source, teacher: Teacher, config: PseudoTagsConfig, data: DataConfig
) -> np.ndarray:
    """Compute the mean probability of each tag over some samples, [V]."""
    total, count = None, 0
    places = spread(source, PRIOR_SAMPLES)
    batches = cut(range(len(places)), config.batch_size)
    for _, pixels, _ in pixels_of(source, places, data, batches):
        if pixels is not None:
            p = teacher.probabilities(pixels, config.temperature)
            total = p.double().sum(dim=0) + (0 if total is None else total)
            count += len(p)
    if total is None:
        raise ConfigError(f"source {source.name!r} has no sample that can be decoded")
    return (total / count).float().cpu().numpy()


@dataclass(frozen=True)
class _Job:
    teacher: Teacher
    own: Sidecar
    config: PseudoTagsConfig

    def run(self, pixels: Tensor, places: Sequence[Place]) -> list[Row]:
        """Make a row per sample: its most probable tags, and its own whatever their probability."""
        probabilities = self.teacher.probabilities(pixels, self.config.temperature).cpu()
        top = torch.topk(probabilities, min(self.config.top, probabilities.shape[1]))
        rows = []
        for p, values, likely, place in zip(
            probabilities.numpy(), top.values.numpy(), top.indices.numpy(), places, strict=True
        ):
            chosen = likely[values >= self.config.threshold]
            ids = np.union1d(chosen, self.own.row(*place, "ids")).astype(np.int32)
            scores = p[ids].astype(np.float32)
            rows.append((ids, scores, np.isin(ids, chosen).astype(np.uint8)))
        return rows

    def pack(self, shard: int, rows: Mapping[int, Row]) -> Columns:
        none: Row = (np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.uint8))
        members = range(len(self.own.source.index(shard)))
        table: Columns = {}
        for number, name in enumerate(TEACHER_COLUMNS):
            column = [rows.get(member, none)[number] for member in members]
            table[name], table["ends"] = pack_rows(column, none[number].dtype)
        return table


def _count(sidecar: Sidecar, own: Sidecar) -> tuple[int, int]:
    """Count the untagged samples, and those of them that got a tag."""
    untagged = added = 0
    for shard in range(len(sidecar.counts)):
        tags = np.diff(own.table(shard)["ends"], prepend=0)
        table = sidecar.table(shard)
        chosen = np.concatenate([[0], np.cumsum(table["chosen"], dtype=np.int64)])
        got = np.diff(chosen[np.concatenate([[0], table["ends"]])])
        mine = np.zeros(len(tags), bool)
        mine[sidecar.source.members(shard)] = True
        untagged += int((mine & (tags == 0)).sum())
        added += int((mine & (tags == 0) & (got > 0)).sum())
    return untagged, added


def open_teacher(
    artifact: Artifact, vocabulary: Path | None, config: PseudoTagsConfig
) -> tuple[Teacher, Vocabulary]:
    """Open an artifact as a teacher with its tags: its own, or for a joint space the given ones.

    Raises ConfigError if the artifact cannot tag, or for a vocabulary that is missing or not used.
    """
    device = dist.choose_device("auto")
    if TAGS in artifact.offers:
        if vocabulary is not None:
            raise ConfigError(f"--vocabulary: {artifact.path} tags with its own vocabulary")
        tagger = Tagger(artifact).to(device)
        tagger.precision = config.precision
        return tagger, Vocabulary.load(artifact.file("vocabulary.json"))
    if JOINT not in artifact.offers:
        raise ConfigError(
            f"{artifact.path} is of stage {artifact.stage}: a hashtag or clip artifact is needed"
        )
    if vocabulary is None:
        raise ConfigError("a clip artifact needs --vocabulary FILE, a json of xray data tags")
    tags = Vocabulary.load(vocabulary)
    encoder = Encoder(artifact).to(device)
    encoder.precision = config.precision
    return PromptTagger(encoder, tags.tags, config.template), tags
