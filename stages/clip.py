"""Stage 3: images and clips lie with their captions; the text side is an LLM (LLM2CLIP)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.captions import choose_caption, kept_captions
from data_pipelines.sources import Sample, Source
from data_pipelines.transforms import load_pixels
from stages.base import Batch, Parents, Stage, State, StepOutput, VisionModule, load_vision, part
from xray.config import RunConfig, TextConfig
from xray.errors import ConfigError
from xray.language import Language
from xray.losses import info_nce
from xray.models.heads import Projection, TextAdapter
from xray.models.text import TextTower
from xray.models.tokens import TOKENS


@dataclass
class ClipOptions:
    """The joint space and its temperature."""

    embed_dim: int = 512
    adapter_blocks: int = 4  # residual MLPs between the LLM and its projection
    logit_scale: float = 1 / 0.07  # initial
    logit_scale_max: float = 100.0


@dataclass
class ClipConfig(RunConfig):
    text: TextConfig = field(default_factory=lambda: TextConfig(tune="none"))
    clip: ClipOptions = field(default_factory=ClipOptions)

    def validate(self) -> None:
        super().validate()
        self.text.validate()
        if not 1 <= self.clip.logit_scale <= self.clip.logit_scale_max:
            raise ConfigError(
                f"clip.logit_scale={self.clip.logit_scale} must be in [1, clip.logit_scale_max="
                f"{self.clip.logit_scale_max}]"
            )


class ClipModule(VisionModule):
    """Backbone + projection against LLM + adapter, with a learnable log logit scale."""

    def __init__(self, config: ClipConfig, text: TextTower) -> None:
        super().__init__(config)
        options = config.clip
        self.towers["text"] = text
        self.frozen_text = config.text.tune == "none"
        self.vision_projection = Projection(self.vision.embed_dim, options.embed_dim)
        self.text_adapter = TextAdapter(text.width, options.embed_dim, options.adapter_blocks)
        # [1] and not 0-d: DeepSpeed cannot flatten 0-d parameters
        self.logit_scale = nn.Parameter(torch.tensor([math.log(options.logit_scale)]))

    def features(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        cls = self.vision(self.normalize(batch["pixels"]), self.keep_rate(progress)).cls
        image = F.normalize(self.vision_projection(cls).float(), dim=-1)
        tower: Any = self.towers["text"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_text):
            pooled = tower(*(batch[key] for key in TOKENS))[:, 0]
        text = F.normalize(self.text_adapter(pooled).float(), dim=-1)
        scale = self.logit_scale.float().exp().squeeze()
        return {"image": image, "text": text, "logit_scale": scale}

    def loss_from_features(self, features: dict[str, Tensor]) -> StepOutput:
        scale = features["logit_scale"]
        loss = info_nce(features["image"], features["text"], scale)
        return StepOutput(loss, {"logit_scale": scale.detach()})

    def train(self, mode: bool = True) -> ClipModule:
        """A frozen text tower stays in eval mode: its dropout must not blur its features."""
        super().train(mode)
        if self.frozen_text:
            self.towers["text"].eval()
        return self


class ClipStage(Stage):
    name = "clip"
    Config = ClipConfig
    accepts = ("mae", "hashtag", "clip", "text")
    spans_batch = True

    def prepare(self, sources: dict[str, Source], parents: Parents) -> dict[str, Source]:
        self.language = Language(self.config.text, parents.text)
        self.config.text = self.language.config
        return sources

    def build(self, parents: Parents) -> ClipModule:
        module = ClipModule(self.config, self.language.build())
        load_vision(module, parents.vision)
        return module

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        fields = self.config.data.sources[sample.source].captions
        caption = choose_caption(kept_captions(sample.files, fields, sample.texts), rng)
        tokens = self.language.tokenizer([caption.text])
        return {"pixels": load_pixels(sample, self.config.data, rng), **tokens}

    def collate(self, rows: Sequence[Batch]) -> Batch:
        pixels = torch.stack([row["pixels"] for row in rows])
        return {"pixels": pixels, **self.language.tokenizer.pad(rows)}

    def after_step(self, engine: Any, module: ClipModule) -> None:
        limit = math.log(self.config.clip.logit_scale_max)
        engine.clamp(module.logit_scale, 0.0, limit)

    def export(self, module: ClipModule, state: State) -> dict[str, State]:
        tower: Any = module.towers["text"]
        head = {"logit_scale": state["logit_scale"]}
        for name in ("vision_projection", "text_adapter"):
            head.update({k: v for k, v in state.items() if k.startswith(f"{name}.")})
        return {
            "backbone": part(state, "towers.vision."),
            "head": head,
            "text": tower.changes(part(state, "towers.text.")),
        }

    def export_files(self) -> dict[str, Any]:
        return self.language.export_files()

    def inputs(self) -> dict[str, str]:
        return {"llm": self.language.digest}
