"""A stage's module and its batches without weights, data or tokenizer: to be counted.

What a run would learn from data is given instead: the number of tags, and a caption of
`text.max_length` tokens for every caption.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from stages import stage_class
from stages.base import Batch, Facts, Parents, StageModule, sketch
from stages.clip import ClipModule
from stages.hashtag import HashtagModule
from stages.mae import masking
from stages.text import TextModule
from xray.models.text_tower import TextTower

TAGS_EACH = 8  # of a sample, whose number hardly matters


def sketch_module(config: Any, facts: Facts) -> tuple[StageModule, int]:
    """The module on the meta device, in the right types, and the width of its sentence vectors.

    Where no LLM is at hand the width is that of the joint space, and the tower is not there.
    """
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=""))
    with torch.device("meta"):
        if config.stage == "hashtag":
            return HashtagModule(plain, [1] * facts.tags), 0
        if config.stage == "text":
            text = _tower(config, facts)
            return TextModule(text, config.text.temperature), text.width
        if config.stage == "clip":
            tower = None if facts.llm is None else _tower(config, facts)
            width = config.clip.embed_dim if tower is None else tower.width
            live = tower if config.text.features == "live" else None
            tags = facts.tags if config.clip.hashtag_weight else 0
            return ClipModule(plain, live, width, None, tags), width
        return stage_class(config.stage)(plain).build(Parents()), 0


def _tower(config: Any, facts: Facts) -> TextTower:
    """The tower as `Language` would build it."""
    assert facts.llm is not None
    text = config.text if facts.text is None else facts.text
    if text.pooling == "auto":
        text = dataclasses.replace(text, pooling="mean")  # none of them but latent has weights
    if facts.text is None and text.tune == "none":
        text = dataclasses.replace(text, lora_rank=0)
    return TextTower(text, facts.llm, weights=False)


def example(config: Any, module: StageModule, size: tuple[int, int, int], width: int) -> Batch:
    """A micro-batch of size (samples, frames, pixels of a side), as the stage's `collate` gives it.

    Values are zeros, and all captions are as long as can be; width: of stored sentence vectors.
    """
    samples, frames, side = size
    batch: Batch = {}
    if config.stage != "text":
        batch["pixels"] = torch.zeros(samples, frames, 3, side, side, dtype=torch.uint8)
    auxiliary = config.clip if config.stage == "clip" else None
    if config.stage == "mae" or (auxiliary is not None and auxiliary.mae_weight):
        grid = sketch(config).geometry.grid(frames, side, side)
        batch["mask_noise"] = torch.zeros(samples, masking(config.mae).noise_size(grid))
    if config.stage == "hashtag" or (auxiliary is not None and auxiliary.hashtag_weight):
        batch["tags"] = torch.zeros(samples, TAGS_EACH, dtype=torch.long)
        batch["weights"] = torch.zeros(samples, TAGS_EACH)
    if config.stage == "text":
        more = config.text.negatives_each if config.text.negatives else 0
        batch |= _captions(samples, 2 + more, config.text.max_length)
    if auxiliary is not None and "text" in module.towers:
        batch |= _captions(samples, auxiliary.captions, config.text.max_length)
    elif auxiliary is not None:
        batch["sentences"] = torch.zeros(samples, auxiliary.captions, width)
    return batch


def _captions(samples: int, each: int, length: int) -> dict[str, Tensor]:
    ones = torch.ones(samples, each, length, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones.clone(), "pooled_mask": ones.clone()}
