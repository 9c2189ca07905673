"""Small modules of all stages with each of their options, and micro-batches for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import settings
from torch import Tensor

from stages import stage_class
from stages.base import Batch, Facts, StageModule, StepOutput
from xray.training.gradient_cache import cached_losses, surrogate_loss

SAMPLES, TAGS, PROGRESS = 8, 100, 0.9  # token reduction and truncation are on at this progress
CLIP = 4  # frames
NEGATIVES = "text.negatives=wrong"
STORED = ("text.features=fp32", "text.tune=none")
Loss = Callable[[StageModule, Batch], Tensor]


@dataclass(frozen=True)
class Variant:
    """A stage with some options."""

    stage: str
    overrides: tuple[str, ...] = ()
    frames: int = 1
    cached: bool = False  # with the gradient cache


def _hashtag(*overrides: str) -> Variant:
    return Variant("hashtag", tuple(f"hashtag.{each}" for each in overrides))


def _stored(*overrides: str, frames: int = 1) -> Variant:
    return Variant("clip", (*STORED, *overrides), frames)


VARIANTS: dict[str, Variant] = {
    "mae image": Variant("mae"),
    "mae clip": Variant("mae", frames=CLIP),
    "mae random clip": Variant("mae", ("mae.video_mask=random",), CLIP),
    "hashtag evit": Variant("hashtag", ("model.reduce=evit",)),
    "hashtag tome": Variant("hashtag", ("model.reduce=tome",)),
    "hashtag random": Variant("hashtag", ("model.reduce=random",)),
    "hashtag attention pooling": Variant("hashtag", ("model.pool=map",)),
    "hashtag mean": Variant("hashtag", ("model.pool=mean",)),
    "hashtag clip, drop path": Variant("hashtag", ("model.drop_path=0.1",), CLIP),
    "hashtag sampled": _hashtag("sampled=16"),
    "hashtag chunk": _hashtag("chunk=32"),
    "hashtag asymmetric": _hashtag("loss=asymmetric", "chunk=32"),
    "hashtag asymmetric, dense": _hashtag("loss=asymmetric"),
    "hashtag bce": _hashtag("loss=bce"),
    "hashtag truncate": _hashtag("truncate=0.3"),
    "hashtag mixup": _hashtag("mixup=0.8"),
    "hashtag cutmix": _hashtag("cutmix=1.0"),
    "hashtag mixup or cutmix": _hashtag("mixup=0.8", "cutmix=1.0"),
    "hashtag smoothing": _hashtag("smoothing=0.1", "chunk=32"),
    "text": Variant("text", ("text.tune=lora",)),
    "text latent": Variant("text", ("text.pooling=latent",)),
    "text negatives": Variant("text", (NEGATIVES, "text.pooling=last")),
    "text full, causal": Variant(
        "text", ("text.tune=full", "text.attention=causal", "text.pooling=last")
    ),
    "text cached": Variant("text", (NEGATIVES,), cached=True),
    "clip stored": _stored(),
    "clip stored, clip": _stored(frames=CLIP),
    "clip sigmoid": _stored("clip.loss=sigmoid"),
    "clip captions": _stored("clip.captions=2"),
    "clip captions, sigmoid": _stored("clip.captions=2", "clip.loss=sigmoid"),
    "clip matryoshka": _stored("clip.matryoshka=[4,8]"),
    "clip mask": _stored("clip.mask_ratio=0.5"),
    "clip auxiliary": _stored("clip.mae_weight=1.0", "clip.hashtag_weight=1.0"),
    "clip checkpointing": _stored("model.grad_checkpointing=true"),
    "clip frames": _stored("model.video=frames", "model.frame_pool=attention", frames=CLIP),
    "clip frozen": Variant("clip", ("text.tune=none",)),
    "clip lora": Variant("clip", ("text.tune=lora", "text.lora_rank=4")),
    "clip cached": Variant("clip", ("text.tune=lora", "text.lora_rank=4"), cached=True),
}


def make(variant: Variant, root: Path) -> tuple[StageModule, Batch]:
    """Build a variant's module in training mode, and a random micro-batch; root has a tiny LLM."""
    torch.manual_seed(0)
    config = settings(variant.stage, root, root / "out", *variant.overrides)
    stage = stage_class(variant.stage)(config)
    module = stage.meta_module(Facts(tags=TAGS, llm=root / "llm")).train()
    side = config.data.resolution
    batch = stage.example_batch(module, SAMPLES, variant.frames, side)
    return module, {key: _random(key, value) for key, value in batch.items()}


def _random(key: str, zeros: Tensor) -> Tensor:
    """Fill an example batch: with captions of different lengths, the last ones missing."""
    if key == "pixels":
        return torch.randint_like(zeros, 256)
    if key == "tags":
        return torch.randint_like(zeros, TAGS)
    if key == "input_ids":
        return torch.randint_like(zeros, 3, TAGS)
    if key in ("attention_mask", "pooled_mask"):
        lengths = torch.arange(zeros.shape[0] * zeros.shape[1]).view(*zeros.shape[:2], 1)
        there = torch.arange(zeros.shape[2]) <= 3 + lengths % 7
        there[-2:, 2:] = False  # a sample may have fewer negatives
        return there.to(zeros.dtype)
    return torch.rand_like(zeros)


def losses(variant: Variant, module: StageModule, batch: Batch) -> Iterator[Tensor]:
    """Compute the losses of a micro-batch, each of which a backward pass follows."""
    if not variant.cached:
        yield _output(module(batch, PROGRESS)).loss
        return
    parts = [{key: value[half] for key, value in batch.items()} for half in halves()]
    with torch.no_grad():
        rows: list[Any] = [module(part, PROGRESS, "features") for part in parts]
    cached = cached_losses(module.loss_from_features, rows, True)
    for part, each in zip(parts, cached, strict=True):
        features: Any = module(part, PROGRESS, "features")
        yield surrogate_loss(features, each.gradients)


def halves() -> Sequence[slice]:
    """Split a block into two micro-batches."""
    return slice(0, SAMPLES // 2), slice(SAMPLES // 2, SAMPLES)


def _output(output: Any) -> StepOutput:
    assert isinstance(output, StepOutput)
    return output
