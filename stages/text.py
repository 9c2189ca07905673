"""Text stage: captions of one picture lie together (caption-contrastive tuning, 2411.04997)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.captions import kept_captions
from data_pipelines.decode import BadSample
from data_pipelines.sources import Sample, Source
from stages.base import Batch, Parents, Stage, StageModule, State, StepOutput, part
from xray.config import RunConfig, TextConfig
from xray.errors import ConfigError
from xray.language import Language
from xray.losses import info_nce
from xray.models.text import TextTower
from xray.models.tokens import TOKENS


@dataclass
class TextOptions(TextConfig):
    """The LLM and the contrast."""

    temperature: float = 0.05


@dataclass
class TextRunConfig(RunConfig):
    text: TextOptions = field(default_factory=TextOptions)

    def validate(self) -> None:
        super().validate()
        self.text.validate()
        if self.text.features != "live":
            raise ConfigError("text.features is for the clip stage: this one trains the model")
        if self.text.tune == "none":
            raise ConfigError("text.tune=none leaves nothing to train: use lora or full")
        if self.text.temperature <= 0:
            raise ConfigError(f"text.temperature={self.text.temperature} must be above 0")


class TextModule(StageModule):
    """The LLM tower under InfoNCE between two captions of each sample."""

    def __init__(self, tower: TextTower, temperature: float) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"text": tower})
        self.temperature = temperature

    def features(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        tower: Any = self.towers["text"]
        pooled = tower(*(batch[key] for key in TOKENS))
        first, second = F.normalize(pooled.float(), dim=-1).unbind(dim=1)
        return {"first": first, "second": second}

    def loss_from_features(self, features: dict[str, Tensor]) -> StepOutput:
        first, second = features["first"], features["second"]
        loss = info_nce(first, second, 1 / self.temperature)
        return StepOutput(loss, {"positive_cosine": (first * second).sum(-1).mean().detach()})


class TextStage(Stage):
    name = "text"
    Config = TextRunConfig
    accepts = ("text",)
    spans_batch = True

    def prepare(self, sources: dict[str, Source], parents: Parents) -> dict[str, Source]:
        self.language = Language(self.config.text, parents.text)
        self.config.text = self.language.config
        return sources

    def build(self, parents: Parents) -> TextModule:
        return TextModule(self.language.build(), self.config.text.temperature)

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        fields = self.config.data.sources[sample.source].captions
        captions = kept_captions(sample.files, fields, sample.texts)
        if len(captions) < 2:
            raise BadSample("only one caption")
        draw = rng if rng is not None else np.random.default_rng(0)
        first, second = draw.permutation(len(captions))[:2]
        return self.language.tokenizer([captions[first].text, captions[second].text])

    def collate(self, rows: Sequence[Batch]) -> Batch:
        return self.language.tokenizer.pad(rows)

    def macs(self, frames: int) -> int:
        return 0

    def export(self, module: TextModule, state: State) -> dict[str, State]:
        tower: Any = module.towers["text"]
        return {"text": tower.changes(part(state, "towers.text."))}

    def export_files(self) -> dict[str, Any]:
        return self.language.export_files()

    def inputs(self) -> dict[str, str]:
        return {"llm": self.language.digest}
