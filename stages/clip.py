"""CLIP stage: contrastive training of images and clips with captions read by an LLM (LLM2CLIP)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Sample, Source
from data_pipelines.text.captions import look_at
from stages.base import (
    Batch,
    Facts,
    Parents,
    Stage,
    StateDict,
    StepOutput,
    VisionModule,
    is_trained,
    load_vision,
    part,
    set_training,
)
from stages.clip_auxiliary import AuxiliaryData, AuxiliaryLosses
from stages.clip_captions import TAUGHT, CaptionData, example_texts, has_captions
from stages.clip_config import ClipConfig
from stages.clip_monitor import ContrastGuard, alignment
from stages.clip_parent import joint_parent, load_heads
from stages.clip_teacher import Teacher, load_teacher
from stages.hashtag import example_labels, pad_labels, vocabulary_size
from stages.mae import example_noise
from stages.text import meta_tower
from xray import dist
from xray.artifacts.artifact import Artifact
from xray.artifacts.language_model import Language
from xray.artifacts.offers import JOINT, SENTENCES, VISION
from xray.config import BlockConfig
from xray.config.schedule import value_at
from xray.losses.contrastive import distillation, row_ids
from xray.losses.named import contrastive_loss
from xray.models.heads import image_head, text_head
from xray.models.patch_dropout import draw_visible, visible_places
from xray.models.text_tower import TextTower
from xray.models.tokenizer import TOKENS
from xray.optim import ALONE


class ClipModule(VisionModule):
    """Backbone and projection, LLM and adapter, and a learnable log logit scale.

    text: None if the batch has sentence vectors of this width. teacher: not registered as a module.
    tags: number of tags of the auxiliary head.
    """

    def __init__(
        self,
        config: ClipConfig,
        text: TextTower | None,
        width: int,
        teacher: Teacher | None = None,
        tags: int = 0,
    ) -> None:
        super().__init__(config)
        options = self.options = config.clip
        if text is not None:
            self.towers["text"] = text
        self.text_frozen_until = 1.0 if config.text.tune == "none" else config.optim.text.freeze
        joint, bias = options.embed_dim, options.head_bias
        self.vision_projection = image_head(options.image_head, self.vision.embed_dim, joint, bias)
        self.sentence_width = width
        sizes = width, joint, options.adapter_blocks, bias
        self.text_adapter = text_head(options.text_head, *sizes)
        # [1] and not 0-d: DeepSpeed cannot flatten 0-d parameters
        self.logit_scale = nn.Parameter(torch.tensor([math.log(options.first_scale)]))
        self.auxiliary = None
        if options.mae_weight or options.hashtag_weight:
            self.auxiliary = AuxiliaryLosses(config, self.vision, tags)
        self.teacher = teacher
        self.contrast, self.logit_bias = contrastive_loss(options.loss), None
        if config.first_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor([config.first_bias]))

    def features(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Return image [B, E] and text [B, C, E] features, normalised, and the loss's inputs.

        Of a batch without captions, return the values of the auxiliary losses only.
        """
        pixels = self.normalize(batch["pixels"])
        visible = self._visible(pixels, progress)  # in both passes: later draws follow this one
        features: dict[str, Tensor] = {}
        captioned, cls = has_captions(batch), None
        if captioned or self.options.hashtag_weight:  # masked reconstruction alone does not read it
            cls = batch["cls"] if "cls" in batch else self.encode(pixels, progress, visible).cls
        if captioned and cls is not None:
            features = self._joint(batch, cls, progress)
        if self.training and self.auxiliary is not None:
            features |= self.auxiliary(self, batch, pixels, cls, progress)
        return features

    def _joint(self, batch: Batch, cls: Tensor, progress: float) -> dict[str, Tensor]:
        """Return the features of images and captions, and the other inputs of their contrast."""
        sentences = self._sentences(batch, progress)
        features = {
            "image": F.normalize(self.vision_projection(cls).float(), dim=-1),
            "text": F.normalize(self.text_adapter(sentences).float(), dim=-1),
            "logit_scale": self.logit_scale.float().exp().squeeze(),
        }
        if "caption_rows" in batch:
            features["caption_rows"] = batch["caption_rows"]
        if not is_trained(progress, self.frozen_until):
            features["cls"] = cls
        if "text" in self.towers and not is_trained(progress, self.text_frozen_until):
            features["sentences"] = sentences
        if self.logit_bias is not None:
            features["logit_bias"] = self.logit_bias.float().squeeze()
        if self.training and self.teacher is not None and "teacher_image" not in batch:
            taught = self.teacher.features(batch["pixels"], part(batch, TAUGHT))
            features["teacher_image"], features["teacher_text"] = taught
        return features

    def _sentences(self, batch: Batch, progress: float) -> Tensor:
        """Encode captions with the LLM, or take their vectors from the batch: [B, C, W] float32."""
        if "sentences" in batch:
            return batch["sentences"]
        tower: Any = self.towers["text"]
        trained = set_training(tower, self.training, progress, self.text_frozen_until)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return tower(*(batch[key] for key in TOKENS)).float()

    def _visible(self, pixels: Tensor, progress: float) -> Tensor | None:
        """Draw the image tokens that stay under patch dropout; None = all of them."""
        ratio = self.options.masked(progress)
        if not self.training or ratio == 0:
            return None
        per_slot = self.vision.video == "frames"
        grid = self.vision.token_grid(pixels)
        return draw_visible(grid, len(pixels), ratio, per_slot, pixels.device)

    def loss_from_features(self, features: dict[str, Tensor]) -> StepOutput:
        if "caption_rows" in features:  # back in the order of the images
            features = {**features, "text": features["text"][features["caption_rows"]]}
        loss, metrics = self.logit_scale.new_zeros(()), dict[str, Tensor]()
        if "text" in features:
            loss, metrics = self._contrast(features)
        for name, weight, term in self._terms(features):
            loss = loss + weight * term
            metrics[name] = term.detach()
        return StepOutput(loss, metrics)

    def _contrast(self, features: dict[str, Tensor]) -> StepOutput:
        """Compute the contrastive loss, without the terms that are added to it."""
        image, text, scale = features["image"], features["text"], features["logit_scale"]
        captions = text.shape[1]
        ids: list[Tensor | None] = [None, None]  # row i pairs with row i
        if captions > 1:
            ids = [row_ids(image), row_ids(image).repeat_interleave(captions)]
        text = text.flatten(0, 1)
        losses = []
        for size in [*self.options.matryoshka, image.shape[1]]:
            a, b = (F.normalize(x[:, :size], dim=-1) for x in (image, text))
            losses.append(self.contrast(a, b, scale, features.get("logit_bias"), *ids))
        loss = torch.stack(losses).mean()
        metrics = {"contrast": loss.detach(), "logit_scale": scale.detach()}
        return StepOutput(loss, metrics | alignment(image, text, captions))

    def _terms(self, features: dict[str, Tensor]) -> Iterator[tuple[str, float, Tensor]]:
        """Yield (name, weight, value) of each term that is added to the contrastive loss."""
        options = self.options
        if "teacher_image" in features and self.teacher is not None:
            sides = features["image"], features["text"].flatten(0, 1), features["logit_scale"]
            taught = features["teacher_image"], features["teacher_text"].flatten(0, 1)
            yield "distill", options.distill, distillation(*sides, *taught, self.teacher.scale)
        for name, weight in (("mae", options.mae_weight), ("hashtag", options.hashtag_weight)):
            if f"{name}_loss" in features:
                yield f"{name}_loss", weight, features[f"{name}_loss"].mean()


class ClipStage(Stage[ClipConfig]):
    """Contrastive alignment of images and clips with captions (CLIP, LLM2CLIP)."""

    name = "clip"
    Config = ClipConfig
    offers = frozenset({VISION, JOINT})
    accepts = frozenset({VISION, SENTENCES})
    spans_batch = True

    def prepare(self, sources: dict[str, Source], parents: Parents) -> dict[str, Source]:
        self.language = Language(self.config.text, self.text_parent(parents))
        self.config = dataclasses.replace(self.config, text=self.language.config)
        self.captions = CaptionData(self.config, sources, self.language)
        self.auxiliary: AuxiliaryData | None = None
        if self.config.clip.mae_weight or self.config.clip.hashtag_weight:
            self.auxiliary = AuxiliaryData(self.config, sources)
        if self.config.clip.teacher:
            device = dist.choose_device(self.config.train.device)
            name, llm = self.config.clip.teacher, self.config.text.llm
            self.captions.teacher = load_teacher(name, device, llm)
        self.guard = ContrastGuard(self.config.captioned, self.config.clip)
        return sources

    def contrasts(self, source: str) -> bool:
        return self.config.contrasts(source)

    def text_parent(self, parents: Parents) -> Artifact | None:
        if parents.text is None and self.config.clip.heads == "parent":
            return joint_parent(parents)
        return parents.text

    def foresee(
        self, sources: dict[str, Source], parents: Parents, pending: frozenset[str]
    ) -> None:
        if SENTENCES not in pending:
            Language(self.config.text, self.text_parent(parents))
        for name in filter(self.contrasts, sources):
            look_at(sources[name], self.config.data.sources[name].captions)

    def build(self, parents: Parents) -> ClipModule:
        more = self.captions.teacher, self.auxiliary.tags if self.auxiliary else 0
        if self.captions.stores:
            width = next(iter(self.captions.stores.values())).width
            module = ClipModule(self.config, None, width, *more)
        else:
            with torch.random.fork_rng(devices=[]):  # new weights do not depend on the LLM
                tower = self.language.build()
            module = ClipModule(self.config, tower, tower.width, *more)
        if self.auxiliary is not None and module.auxiliary is not None:
            self.auxiliary.start(module.auxiliary)
        load_vision(module, parents.vision)
        if self.config.clip.heads == "parent":
            load_heads(module, joint_parent(parents))
        return module

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        batch = self.captions.transform(sample, rng)
        batch["pixels"] = load_pixels(sample, self.config.data, rng)
        if self.auxiliary is not None:
            batch |= self.auxiliary.transform(sample, batch["pixels"], rng)
        return batch

    def collate(self, rows: Sequence[Batch]) -> Batch:
        fixed = [key for key in rows[0] if key in ("pixels", "mask_noise")]
        batch: Batch = {key: torch.stack([row[key] for row in rows]) for key in fixed}
        batch |= self.captions.collate(rows)
        return batch | pad_labels(rows) if "tags" in rows[0] else batch

    def arrange(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Order the captions by length; images keep their places."""
        if not self.config.text.bucket_by_length:
            return batches
        tokens, rows = self.language.tokenizer.bucket(batches)
        parts = rows.split([len(batch["pixels"]) for batch in batches])
        return [
            {**batch, **own, "caption_rows": part}
            for batch, own, part in zip(batches, tokens, parts, strict=True)
        ]

    def visible(self, frames: int, progress: float) -> int:
        side = value_at(self.config.data.resolution, progress)
        grid = self._sketch.geometry.grid(frames, side, side)
        per_slot = self.config.model.video == "frames"
        return math.prod(visible_places(grid, self.config.clip.masked(progress), per_slot))

    def count(self, sources: dict[str, Source], facts: Facts) -> tuple[Facts, list[str]]:
        options, notes = self.config.clip, list[str]()
        if options.teacher:
            notes.append(f"clip.teacher={options.teacher} is not counted")
        if not options.hashtag_weight:
            return facts, notes
        tags, assumed = vocabulary_size(self.config, self.config.hashtag, sources, facts.tags)
        return dataclasses.replace(facts, tags=tags), notes + assumed

    def meta_module(self, facts: Facts) -> ClipModule:
        """Build the module; if the LLM is unknown, without a text tower."""
        tower = None if facts.llm is None else meta_tower(self.config.text, facts)
        width = self.config.clip.embed_dim if tower is None else tower.width
        live = tower if self.config.text.features == "live" else None
        tags = facts.tags if self.config.clip.hashtag_weight else 0
        return ClipModule(self.config, live, width, None, tags)

    def example_batch(
        self, module: ClipModule, samples: int, frames: int, side: int, source: str = ""
    ) -> Batch:
        batch = super().example_batch(module, samples, frames, side)
        options = self.config.clip
        if self.contrasts(source):
            width = None if "text" in module.towers else module.sentence_width
            batch |= example_texts(self.config, samples, width)
        if options.mae_weight:
            size = samples, frames, side
            batch["mask_noise"] = example_noise(self.config, self.config.mae, *size)
        return batch | example_labels(samples) if options.hashtag_weight else batch

    def spans(self) -> list[tuple[float, float]]:
        options = self.config.clip
        masked = [(options.mask_span[0], options.mask_span[1])] if options.mask_ratio else []
        return [*super().spans(), *masked, (options.mask_until, options.mask_until)]

    def models(self) -> dict[str, str]:
        return {**super().models(), "teacher": self.config.clip.teacher}

    def after_step(self, engine: Any, module: ClipModule) -> None:
        engine.clamp(module.logit_scale, 0.0, math.log(self.config.clip.logit_scale_max))

    def watch(self, values: dict[str, float], progress: float) -> list[str]:
        return self.guard.check(values, progress)

    def chance(self, block: BlockConfig) -> float:
        return self.config.clip.chance(block.samples) if self.contrasts(block.source) else 0.0

    def export(self, module: ClipModule, state: StateDict) -> dict[str, StateDict]:
        text = self.language.changes()
        if "text" in module.towers:
            tower: Any = module.towers["text"]
            text = tower.changes(part(state, "towers.text."))
        of_head = (*ALONE, "vision_projection.", "text_adapter.")
        head = {name: value for name, value in state.items() if name.startswith(of_head)}
        return {"backbone": part(state, "towers.vision."), "head": head, "text": text}

    def export_files(self) -> dict[str, Any]:
        return self.language.export_files()

    def inputs(self) -> dict[str, str]:
        stores, teacher = self.captions.stores, self.captions.teacher
        stored = {f"text_features/{name}": store.digest for name, store in stores.items()}
        taught = {"teacher": teacher.digest} if teacher is not None else {}
        auxiliary = self.auxiliary.inputs() if self.auxiliary is not None else {}
        return {"llm": self.language.digest, **stored, **taught, **auxiliary}
