"""Stage 2: multi-label tag classification of images and clips with one shared head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode import BadSample
from data_pipelines.hashtags import (
    Vocabulary,
    build_vocabulary,
    keep_tagged,
    read_tags,
    tags_of,
)
from data_pipelines.sources import Sample, Source
from data_pipelines.transforms import load_pixels
from stages.base import (
    Batch,
    Parents,
    Stage,
    State,
    StepOutput,
    VisionModule,
    load_vision,
    part,
)
from xray.config import RunConfig
from xray.errors import ArtifactError, ConfigError
from xray.losses import soft_cross_entropy, tag_entropy
from xray.models.heads import TagHead
from xray.models.mixing import mix


@dataclass
class HashtagOptions:
    """The vocabulary: a file, or built from the run's own shards."""

    vocabulary: str = ""  # a vocabulary.json; "" = build it
    min_count: int = 5
    max_size: int = 100_000
    # Beta(a, a) of the mixing within a micro-batch; 0 = off; with both, one is drawn for each
    mixup: float = 0.0  # the pictures are blended
    cutmix: float = 0.0  # a rectangle is taken from the other picture


@dataclass
class HashtagConfig(RunConfig):
    hashtag: HashtagOptions = field(default_factory=HashtagOptions)

    def validate(self) -> None:
        super().validate()
        for name in ("mixup", "cutmix"):
            if getattr(self.hashtag, name) < 0:
                raise ConfigError(f"hashtag.{name}={getattr(self.hashtag, name)} must be >= 0")


class HashtagModule(VisionModule):
    """Backbone and tag head on the CLS features."""

    def __init__(self, config: HashtagConfig, tags: int) -> None:
        super().__init__(config)
        self.head = TagHead(self.vision.embed_dim, tags)
        self.mix = config.hashtag.mixup, config.hashtag.cutmix

    def features(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        pixels, share = self.normalize(batch["pixels"]), None
        if self.training and any(self.mix):
            pixels, share = mix(pixels, *self.mix)
        features = {"logits": self.head(self.vision(pixels, self.keep_rate(progress)).cls)}
        return features | {"tags": batch["tags"]} | ({} if share is None else {"share": share})

    def loss_from_features(self, features: dict[str, Tensor]) -> StepOutput:
        logits, tags = features["logits"], features["tags"]
        loss = soft_cross_entropy(logits, tags)
        if "share" in features:  # linear in the target: the mixed target's loss is the losses' mix
            share = features["share"]
            loss = share * loss + (1 - share) * soft_cross_entropy(logits, tags.roll(1, 0))
        top = logits.argmax(dim=1, keepdim=True)
        metrics = {
            "excess": loss.detach() - tag_entropy(tags),
            "top1_is_a_tag": (tags == top).any(dim=1).float().mean(),
        }
        return StepOutput(loss, metrics)


class HashtagStage(Stage):
    name = "hashtag"
    Config = HashtagConfig
    accepts = ("mae", "hashtag", "clip")

    def prepare(self, sources: dict[str, Source], parents: Parents) -> dict[str, Source]:
        """Read or build the vocabulary and leave untagged samples out of the plan."""
        data, options = self.config.data, self.config.hashtag
        tags = {name: read_tags(s, data.sources[name].tags) for name, s in sources.items()}
        if options.vocabulary:
            self.vocabulary = Vocabulary.load(Path(options.vocabulary))
        else:
            seen = {block.source: tags[block.source] for block in self.config.blocks}
            self.vocabulary = build_vocabulary(seen, options.min_count, options.max_size)
        if parents.vision is not None and parents.vision.stage == self.name:
            theirs = Vocabulary.load(parents.vision.path / "vocabulary.json")
            if theirs.tags != self.vocabulary.tags:
                raise ArtifactError(
                    f"the vocabulary ({len(self.vocabulary)} tags) does not match the head of "
                    f"{parents.vision.path} ({len(theirs)} tags): set hashtag.vocabulary="
                    f"{parents.vision.path / 'vocabulary.json'}"
                )
        return {name: keep_tagged(s, tags[name], self.vocabulary) for name, s in sources.items()}

    def build(self, parents: Parents) -> HashtagModule:
        module = HashtagModule(self.config, len(self.vocabulary))
        load_vision(module, parents.vision)
        if parents.vision is not None and parents.vision.stage == self.name:
            module.head.load_state_dict(parents.vision.load("head"))
        return module

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        origin = self.config.data.sources[sample.source].tags
        ids = self.vocabulary.encode(tags_of(sample.files, origin))
        if not ids:
            raise BadSample("no tag of the vocabulary")
        return {"pixels": load_pixels(sample, self.config.data, rng), "tags": torch.tensor(ids)}

    def collate(self, rows: Sequence[Batch]) -> Batch:
        tags = [row["tags"] for row in rows]
        return {
            "pixels": torch.stack([row["pixels"] for row in rows]),
            "tags": torch.nn.utils.rnn.pad_sequence(tags, batch_first=True, padding_value=-1),
        }

    def export(self, module: HashtagModule, state: State) -> dict[str, State]:
        return {"backbone": part(state, "towers.vision."), "head": part(state, "head.")}

    def export_files(self) -> dict[str, Any]:
        return {"vocabulary.json": self.vocabulary}

    def inputs(self) -> dict[str, str]:
        return {"vocabulary": self.vocabulary.digest}
