"""Text stage: contrastive tuning of an LLM on captions of the same image (2411.04997)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.shards.source import Sample, Source
from data_pipelines.text.captions import choose_captions, kept_captions, look_at, texts_of
from stages.base import Batch, Facts, Parents, Stage, StageModule, StateDict, StepOutput, part
from stages.text_config import TextOptions, TextRunConfig
from xray.artifacts.language_model import Language
from xray.artifacts.offers import SENTENCES
from xray.config import TextConfig
from xray.errors import BadSample, ConfigError, DataError
from xray.losses.contrastive import contrast, info_nce, row_ids
from xray.models.text_tower import TextTower
from xray.models.tokenizer import TOKENS

NO_POSITIVE = 1 << 40  # id of a text that is not the positive of any row


class TextModule(StageModule):
    """LLM tower with InfoNCE between two captions of each sample."""

    def __init__(self, tower: TextTower, temperature: float) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"text": tower})
        self.temperature = temperature

    def features(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Encode two captions [B, D] and n negatives [B, n, D], normalised; there: mask [B, n]."""
        tower: Any = self.towers["text"]
        pooled = F.normalize(tower(*(batch[key] for key in TOKENS)).float(), dim=-1)
        there = batch["attention_mask"].any(dim=-1).float()
        return {
            "first": pooled[:, 0],
            "second": pooled[:, 1],
            "negatives": pooled[:, 2:],
            "there": there[:, 2:],
        }

    def loss_from_features(self, features: dict[str, Tensor]) -> StepOutput:
        first, second = features["first"], features["second"]
        scale = 1 / self.temperature
        metrics = {"positive_cosine": (first * second).sum(-1).mean().detach()}
        if not features["there"].numel():
            return StepOutput(info_nce(first, second, scale), metrics)
        negatives, own = features["negatives"].flatten(0, 1), row_ids(first)
        without = torch.where(features["there"].flatten() > 0, NO_POSITIVE, -1)
        ids = torch.cat([own, without])
        ways = [
            contrast(queries, torch.cat([keys, negatives]), scale, own, ids)
            for queries, keys in ((first, second), (second, first))
        ]
        return StepOutput((ways[0] + ways[1]) / 2, metrics)


def meta_tower(config: TextConfig, facts: Facts) -> TextTower:
    """Build the tower as `Language` would, without weights; `facts.llm` must be known."""
    assert facts.llm is not None
    text = config if facts.text is None else facts.text
    if text.pooling == "auto":
        text = dataclasses.replace(text, pooling="mean")  # only latent pooling has weights
    if facts.text is None and text.tune == "none":
        text = dataclasses.replace(text, lora_rank=0)
    return TextTower(text, facts.llm, weights=False)


def example_captions(samples: int, each: int, length: int) -> Batch:
    """Make captions of full length without padding, for planning."""
    ones = torch.ones(samples, each, length, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones.clone(), "pooled_mask": ones.clone()}


class TextStage(Stage[TextRunConfig]):
    """Contrastive tuning of the LLM on captions of the same sample (LLM2CLIP)."""

    name = "text"
    Config = TextRunConfig
    offers = accepts = frozenset({SENTENCES})
    modalities = ("image", "video", "text")
    spans_batch = True

    def prepare(self, sources: dict[str, Source], parents: Parents) -> dict[str, Source]:
        self.language = Language(self.config.text, parents.text)
        resolved = self.language.config
        assert isinstance(resolved, TextOptions)  # the given section with defaults resolved
        self.config = dataclasses.replace(self.config, text=resolved)
        negatives, with_negatives = resolved.negatives, 0
        for name, source in sources.items():
            fields = self.config.data.sources[name].captions
            looked = look_at(source, fields, negatives)
            if not looked.pairs:
                raise DataError(
                    f"none of the samples of source {name!r} that were read has two captions, "
                    "which stage text compares: leave it out (stages=[mae,hashtag,clip]), or name "
                    f"the json fields that have more in data.sources.{name}.captions"
                )
            self.language.warn_of_cut(looked.captions)
            with_negatives += looked.negatives
        if negatives and sources and not with_negatives:
            raise ConfigError(
                f"text.negatives={negatives}: none of the samples that were read has this field"
            )
        return sources

    def build(self, parents: Parents) -> TextModule:
        return TextModule(self.language.build(), self.config.text.temperature)

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        """Tokenize two of a sample's captions, then its negatives, padded if some are missing."""
        fields, options = self.config.data.sources[sample.source].captions, self.config.text
        captions = kept_captions(sample.files, fields, sample.texts)
        if len(captions) < 2:
            raise BadSample("one caption, where two are needed")
        texts = [caption.text for caption in choose_captions(captions, rng, 2)]
        draw, lacks = rng if rng is not None else np.random.default_rng(0), 0
        if options.negatives:
            wrong = texts_of(sample.files, options.negatives)
            chosen = draw.permutation(len(wrong))[: options.negatives_each]
            texts += [wrong[number] for number in chosen]
            lacks = options.negatives_each - len(chosen)
        tokens = self.language.tokenizer(texts)
        return {key: F.pad(value, (0, 0, 0, lacks)) for key, value in tokens.items()}

    def collate(self, rows: Sequence[Batch]) -> Batch:
        return self.language.tokenizer.pad(rows)

    def arrange(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        bucket = self.config.text.bucket_by_length
        return self.language.tokenizer.bucket(batches)[0] if bucket else batches

    def macs(self, frames: int, progress: float = 1.0) -> int:
        return 0

    def visible(self, frames: int, progress: float) -> int:
        return 0

    def meta_module(self, facts: Facts) -> TextModule:
        return TextModule(meta_tower(self.config.text, facts), self.config.text.temperature)

    def example_batch(
        self, module: Any, samples: int, frames: int, side: int, source: str = ""
    ) -> Batch:
        options = self.config.text
        more = options.negatives_each if options.negatives else 0
        return example_captions(samples, 2 + more, options.max_length)

    def spans(self) -> list[tuple[float, float]]:
        return []

    def export(self, module: TextModule, state: StateDict) -> dict[str, StateDict]:
        tower: Any = module.towers["text"]
        return {"text": tower.changes(part(state, "towers.text."))}

    def export_files(self) -> dict[str, Any]:
        return self.language.export_files()

    def first_weights(self) -> str:
        return self.config.text.llm or "scratch"

    def inputs(self) -> dict[str, str]:
        return {"llm": self.language.digest}
