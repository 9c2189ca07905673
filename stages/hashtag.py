"""Hashtag stage: multi-label tag classification of images and clips with one shared head."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.sidecar import Sidecar, open_sidecar
from data_pipelines.shards.source import Sample, Source
from data_pipelines.tags.balance import Balance
from data_pipelines.tags.labels import (
    BalancedSource,
    Labeller,
    TeacherRules,
    balanced,
    count_labels,
    label,
    mean_frequency,
    most_labels,
    teacher_sidecar,
)
from data_pipelines.tags.missing import TagKeys, why_no_tags
from data_pipelines.tags.vocabulary import TagCounts, Vocabulary, build_vocabulary, count_tags
from stages.base import (
    Batch,
    Facts,
    Parents,
    Stage,
    StateDict,
    StepOutput,
    VisionModule,
    load_vision,
    part,
)
from stages.feature_guard import RANK
from stages.hashtag_config import HashtagConfig, HashtagOptions
from xray import dist
from xray.artifacts.offers import TAGS, VISION
from xray.config import RunConfig
from xray.errors import ArtifactError, ConfigError
from xray.losses.named import tag_loss
from xray.losses.sampled_softmax import (
    draw_classes,
    sampled_softmax,
    sampling_probabilities,
    to_device,
)
from xray.losses.sharded_classes import sharded_loss
from xray.losses.tags import truncate
from xray.models.effective_rank import effective_rank
from xray.models.heads import TagHead
from xray.models.mixup import mix

log = logging.getLogger("xray")


EXAMPLE_TAGS = 8  # per sample
LEAST_WEIGHT = 1e-6  # sum of a sample's label weights, against division by 0
# (features, weight, bias) -> losses [B], and top tags [B] unless tags are sampled
HeadLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class HashtagModule(VisionModule):
    """Backbone and tag head on the CLS features; counts: samples per tag, [V]."""

    def __init__(self, config: HashtagConfig, counts: Sequence[int]) -> None:
        super().__init__(config)
        options = self.options = config.hashtag
        self.head = TagHead(self.vision.embed_dim, len(counts))
        self.loss = tag_loss(options.loss)(options.smoothing, options.chunk)
        self.mix, self.views = (options.mixup, options.cutmix), config.data.views
        self.drawn = sampling_probabilities(torch.tensor(counts))
        if options.shard_classes:
            self.sharded = ("head.weight", "head.bias")

    def features(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        pixels = self.normalize(batch["pixels"])
        tags, targets = batch["tags"], self.loss.targets(batch["weights"])
        if self.training and any(self.mix):
            pixels, share = mix(pixels, *self.mix, self.views)
            tags = torch.cat([tags, tags.roll(self.views, 0)], dim=1)
            other = targets.roll(self.views, 0)
            targets = torch.cat([share * targets, (1 - share) * other], dim=1)
        cls = self.encode(pixels, progress).cls
        progressed = torch.tensor(progress)  # on the CPU, where it is read
        return {"cls": cls, "tags": tags, "targets": targets, "progress": progressed}

    def loss_from_features(self, features: dict[str, Tensor]) -> StepOutput:
        tags, targets = features["tags"], features["targets"]
        losses, top = self.head(features["cls"], self._losses(tags, targets))
        loss, doubts = losses.mean(), losses
        metrics = {RANK: effective_rank(features["cls"])}
        floor = self.loss.floor(targets, len(self.drawn))
        if floor is not None:
            metrics["excess"] = loss.detach() - floor.mean()
            # relative to the number and certainty of a sample's tags
            doubts = (losses - floor) / targets.sum(dim=1).clamp(min=LEAST_WEIGHT)
        if top is not None:
            metrics["top1_is_a_tag"] = (tags == top[:, None]).any(dim=1).float().mean()
        options = self.options
        if self.training and options.truncate and features["progress"] >= options.truncate_after:
            loss = truncate(losses, doubts, options.truncate, float(torch.rand(())))
        return StepOutput(loss, metrics)

    def _losses(self, tags: Tensor, targets: Tensor) -> HeadLoss:
        classes = len(self.drawn)
        if len(self.head.weight) < classes and self.sharded:
            return lambda x, w, b: sharded_loss(self.loss, x, w, b, tags, targets, classes)
        if not (self.training and self.options.sampled):
            return lambda x, w, b: self.loss(x, w, b, tags, targets)
        draws = draw_classes(self.drawn, self.options.sampled)  # on the CPU: the same on any device
        drawn, log_q = (to_device(x, tags.device) for x in draws)
        return lambda x, w, b: (sampled_softmax(x, w, b, tags, targets, drawn, log_q), None)


def pad_labels(rows: Sequence[Batch], least: int = 0) -> Batch:
    """Pad tags and weights of samples to [B, K], with K of `least` or more."""
    filling = {"tags": -1, "weights": 0}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], True, value)
        for name, value in filling.items()
    }
    more = max(0, least - batch["tags"].shape[1])
    return {name: F.pad(batch[name], (0, more), value=value) for name, value in filling.items()}


def find_vocabulary(
    config: RunConfig, options: HashtagOptions, sources: Mapping[str, Source]
) -> Vocabulary:
    """Load the vocabulary that hashtag.vocabulary names, or build one from the run's samples."""
    if options.vocabulary:
        return Vocabulary.load(Path(os.path.expanduser(options.vocabulary)))
    counts, names = TagCounts(), [block.source for block in config.blocks]

    def why_none() -> str:
        return "; ".join(why_untagged(config, options, sources[name]) for name in names)

    try:
        for name in names:
            own, workers = config.data.sources[name], config.data.workers
            given = sources[name], own.tags, options, workers
            counts.join(count_tags(*given, captions=own.captions))
        where = ", ".join(names)
        return build_vocabulary(counts, options, where, None, "hashtag.", why_none)[0]
    except ConfigError as error:  # about a key of the rules
        raise ConfigError(f"hashtag.{error}") from error


def why_untagged(config: RunConfig, options: HashtagOptions, source: Source) -> str:
    """Say why the samples of a source have no tags, and each way out."""
    own = config.data.sources[source.name]
    kinds = dict.fromkeys(config.data.sources[block.source].modality for block in config.blocks)
    others = ",".join(kind for kind in kinds if kind != own.modality)
    leave_out = f"leave the source out with data.modalities=[{others}]" if others else ""
    leave_out = leave_out or f"leave out the {config.stage} stage"
    keys = TagKeys(f"data.sources.{source.name}.tags", "hashtag.field")
    return why_no_tags(source, own.tags, options, own.captions, keys, leave_out)


def vocabulary_size(
    config: RunConfig, options: HashtagOptions, sources: Mapping[str, Source], given: int
) -> tuple[int, list[str]]:
    """Return the size of the vocabulary for planning, and a note if it had to be assumed.

    given: a size that the user states, 0 = none.
    """
    if given:
        return given, []
    if options.vocabulary or all(block.source in sources for block in config.blocks):
        size = len(find_vocabulary(config, options, sources))
        if size:
            return size, []
    return options.max_size, [
        f"the number of tags is not known yet: {options.max_size:,} are assumed, the value of "
        "hashtag.max_size; set --tags or hashtag.vocabulary to change it"
    ]


def example_labels(samples: int) -> Batch:
    """Make tags and weights of a micro-batch for planning; their number hardly matters."""
    tags = torch.zeros(samples, EXAMPLE_TAGS, dtype=torch.long)
    return {"tags": tags, "weights": torch.zeros(samples, EXAMPLE_TAGS)}


class HashtagStage(Stage[HashtagConfig]):
    """Multi-label classification of tags."""

    name = "hashtag"
    Config = HashtagConfig
    offers = frozenset({VISION, TAGS})
    teacher_digest = ""  # hash of the artifact whose sidecar is used
    padded = 0  # tags that each sample is padded to, if ranks gather them; 0 = as a batch needs

    def prepare(self, sources: dict[str, Source], parents: Parents) -> dict[str, Source]:
        """Read or build the vocabulary, label the samples and keep the labelled ones, balanced."""
        options, data = self.config.hashtag, self.config.data
        self.vocabulary = find_vocabulary(self.config, options, sources)
        if parents.vision is not None and TAGS in parents.vision.offers:
            path = parents.vision.file("vocabulary.json")
            _check_same(self.vocabulary, Vocabulary.load(path).digest, f"the head of {path.parent}")
        training = {block.source for block in self.config.blocks}
        self.balanced: dict[str, BalancedSource] = {}
        for name, source in sources.items():
            teacher = self._teacher(source) if name in training else None
            use, own = TeacherRules(options.min_lift, options.pseudo_weight), data.sources[name]
            work = Labeller(source, own.tags, options, self.vocabulary, teacher, use, own.captions)
            labels = label(work, data.workers)
            balance: Balance = options.balance if name in training else "none"
            settings = balance, options.epoch_length, self.config.seed, data.workers
            why = partial(why_untagged, self.config, options, source)
            self.balanced[name] = balanced(source, labels, len(self.vocabulary), *settings, why)
            if dist.is_main():
                log.info("source %s: %s", name, self._labelled(work, self.balanced[name]))
        if options.shard_classes:
            self.padded = max(most_labels(own.labels) for own in self.balanced.values())
        return {name: own.source for name, own in self.balanced.items()}

    def _labelled(self, work: Labeller, balanced: BalancedSource) -> str:
        """Describe how many samples have tags, and how the teacher changed them."""
        tagged = "{:,} of {:,} samples have tags of the vocabulary"
        if work.teacher is None:  # the balance has counted them already
            return tagged.format(balanced.unique, len(work.source))
        counts = count_labels(balanced.labels)
        text = tagged.format(counts.own, len(work.source))
        before = count_labels(label(replace(work, teacher=None), self.config.data.workers))
        dropped = 1 - counts.tags / max(1, before.tags)
        return (
            f"{text}; the teacher dropped {dropped:.1%} of their tags, and gave tags to "
            f"{counts.pseudo_labelled:,} samples without"
        )

    def _teacher(self, source: Source) -> Sidecar | None:
        name, own = self.config.hashtag.teacher, self.config.data.sources[source.name]
        if not name:
            return None
        field = self.config.hashtag.field
        sidecar = teacher_sidecar(name, source, own.tags, field, own.captions)
        opened = open_sidecar(source, sidecar)
        if opened is None:
            where = f"field={field}" if own.tags == "hashtags" else f"captions={own.captions}"
            raise ConfigError(
                f"hashtag.teacher={name} has no pseudo-tags for the shards of source "
                f"{source.name!r} with tags={own.tags} {where}: run xray data pseudo-tags on them "
                "with these settings"
            )
        _check_same(self.vocabulary, opened.facts["vocabulary"], f"hashtag.teacher={name}")
        self.teacher_digest = opened.facts["teacher"]
        return opened

    def build(self, parents: Parents) -> HashtagModule:
        module = HashtagModule(self.config, self.vocabulary.counts)
        strip = self.config.hashtag.strip
        seen = [(b.samples, self.balanced[b.source].frequency(strip)) for b in self.config.blocks]
        frequency = torch.from_numpy(mean_frequency(seen))
        module.head.start(module.loss.initial_bias(frequency))
        if dist.is_main():
            chance = module.loss.chance(frequency)
            log.info("chance: predicting the tags' frequencies gives a loss of %.3f", chance)
        load_vision(module, parents.vision)
        if parents.vision is not None and TAGS in parents.vision.offers:
            module.head.load_state_dict(parents.vision.load("head"))
        return module

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        balanced = self.balanced[sample.source]
        place = sample.shard, sample.member, sample.copy
        ids, weights = balanced.labels_of(*place, self.config.hashtag.strip)
        return {
            "pixels": load_pixels(sample, self.config.data, rng),
            "tags": torch.tensor(ids, dtype=torch.long),
            "weights": torch.tensor(weights),
        }

    def collate(self, rows: Sequence[Batch]) -> Batch:
        return {
            "pixels": torch.stack([row["pixels"] for row in rows]),
            **pad_labels(rows, self.padded),
        }

    def export(self, module: HashtagModule, state: StateDict) -> dict[str, StateDict]:
        return {"backbone": part(state, "towers.vision."), "head": part(state, "head.")}

    def export_files(self) -> dict[str, Any]:
        return {"vocabulary.json": self.vocabulary}

    def count(self, sources: dict[str, Source], facts: Facts) -> tuple[Facts, list[str]]:
        tags, notes = vocabulary_size(self.config, self.config.hashtag, sources, facts.tags)
        return replace(facts, tags=tags), notes

    def meta_module(self, facts: Facts) -> HashtagModule:
        return HashtagModule(self.config, [1] * facts.tags)

    def example_batch(
        self, module: Any, samples: int, frames: int, side: int, source: str = ""
    ) -> Batch:
        return super().example_batch(module, samples, frames, side) | example_labels(samples)

    def inputs(self) -> dict[str, str]:
        digests = {"vocabulary": self.vocabulary.digest, "teacher": self.teacher_digest}
        return {name: digest for name, digest in digests.items() if digest}


def _check_same(vocabulary: Vocabulary, digest: str, what: str) -> None:
    """Raise ArtifactError if a vocabulary differs from the run's."""
    if vocabulary.digest != digest:
        raise ArtifactError(
            f"{what} is of another vocabulary than this run's {len(vocabulary)} tags: set "
            "hashtag.vocabulary to the vocabulary.json it was made with"
        )
