"""Captions of a clip run: tokens or stored sentence vectors, and tokens for a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from data_pipelines.shards.source import Sample, Source
from data_pipelines.text.captions import choose_captions, kept_captions, look_at
from data_pipelines.text.feature_store import TextStore, open_store, store_facts
from stages.base import Batch, part
from stages.clip_config import ClipConfig
from stages.clip_teacher import Teacher
from stages.text import example_captions
from xray.artifacts.language_model import Language
from xray.models.tokenizer import TOKENS

TAUGHT = "teacher_"  # prefix of the batch keys of a teacher's tokens


class CaptionData:
    """Reader of the captions of each sample, of all sources but those of clip.uncaptioned."""

    def __init__(
        self, config: ClipConfig, sources: Mapping[str, Source], language: Language
    ) -> None:
        self.config, self.language = config, language
        self.teacher: Teacher | None = None
        self.stores: dict[str, TextStore] = {}
        stored = config.text.features
        for name in filter(config.contrasts, sources):
            source, fields = sources[name], config.data.sources[name].captions
            language.warn_of_cut(look_at(source, fields).captions)
            if stored != "live":
                facts = store_facts(source, language.identity(), fields, stored)
                self.stores[name] = open_store(source, facts)

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        """Read the captions of a sample; {} if its source needs none. Raises BadSample."""
        if not self.config.contrasts(sample.source):
            return {}
        fields = self.config.data.sources[sample.source].captions
        kept = kept_captions(sample.files, fields, sample.texts)
        captions = choose_captions(kept, rng, self.config.clip.captions)
        texts = [caption.text for caption in captions]
        if self.stores:
            numbers = [caption.number for caption in captions]
            vectors = self.stores[sample.source].vectors(sample.shard, sample.member, numbers)
            batch = {"sentences": torch.from_numpy(vectors)}
        else:
            batch = self.language.tokenizer(texts)
        if self.teacher is not None:
            batch |= {f"{TAUGHT}{k}": v for k, v in self.teacher.tokens(texts).items()}
        return batch

    def collate(self, rows: Sequence[Batch]) -> Batch:
        """Stack the captions of a micro-batch, if its samples have any."""
        batch: Batch = {}
        if "sentences" in rows[0]:
            batch["sentences"] = torch.stack([row["sentences"] for row in rows])
        elif TOKENS[0] in rows[0]:
            batch |= self.language.tokenizer.pad(rows)
        taught = [part(row, TAUGHT) for row in rows]
        if self.teacher is not None and taught[0]:
            batch |= {f"{TAUGHT}{k}": v for k, v in self.teacher.pad(taught).items()}
        return batch


def example_texts(config: ClipConfig, samples: int, width: int | None) -> Batch:
    """Make captions of full length for planning, or stored vectors of this width."""
    each = config.clip.captions
    if width is None:
        return example_captions(samples, each, config.text.max_length)
    return {"sentences": torch.zeros(samples, each, width)}


def has_captions(batch: Batch) -> bool:
    """Return True for a micro-batch with captions or their vectors."""
    return "sentences" in batch or TOKENS[0] in batch
