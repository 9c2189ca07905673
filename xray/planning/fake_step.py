"""A training step with fake tensors: its memory and FLOPs, without data, weights or GPU.

The stage's own module and losses run in the schedule of the real step (gradient_cache.py); of a
block's equal micro-batches one is run.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipelines.stream.sampling import MicroBatch, StepShape
from stages import stage_class
from stages.base import Batch, Facts, Stage, StageModule
from stages.tuning import set_trained
from xray.artifacts.offers import VISION
from xray.config import RunConfig
from xray.config.run import text_section
from xray.config.schedule import steps_of
from xray.planning.memory_tracker import LiveBytes, materialize
from xray.training.gradient_cache import CachedLoss, Pass, cached_losses, schedule, surrogate_loss
from xray.training.row_shards import keep_own_rows, sharded_shapes
from xray.training.step_data import step_shape

GRADIENTS = "gradients"
Sizes = tuple[int, int, int, str]  # samples, frames, resolution and source of a micro-batch


@dataclass(frozen=True)
class Size:
    """Size of a module's tensors, in values and in bytes."""

    trained: int  # values, all fp32
    largest: int  # values of the largest trained parameter on a rank
    frozen: int  # values
    frozen_bytes: int  # without the LLM
    llm_bytes: int  # of the text tower, trained or not
    llm_trained: int  # values
    elsewhere: int  # trained values that only other ranks hold


@dataclass(frozen=True)
class Peak:
    """Peak memory of a micro-batch in bytes, without weights and optimizer."""

    activations: int
    logits: int
    batch: int
    features: int  # of split blocks, with their gradients
    gradients: int  # complete or not, if they are not partitioned

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.batch + self.features + self.gradients


@dataclass(frozen=True)
class Rehearsal:
    """Simulated step on one rank at a point of the stage's progress."""

    with_gradients: Peak  # with unpartitioned gradients beside the activations
    alone: Peak  # without gradients, which are counted elsewhere
    flops: int
    recomputed: int  # FLOPs of the gradient cache's second forward passes
    micros: int
    tokens: int  # of images and clips, before any are masked or reduced


def size_of(config: RunConfig, facts: Facts) -> Size:
    """Count the parameters of a stage's module."""
    module = planned(config, facts)[1]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    keep_own_rows(module, sharded_shapes(module))
    own = [p.numel() for p in module.parameters() if p.requires_grad]
    held = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    llm = [p for n, p in module.named_parameters() if n.startswith("towers.text.")]
    other = sum(p.nbytes for n, p in held.items() if not n.startswith("towers.text."))
    return Size(
        trained=trained,
        largest=max(own, default=0),
        frozen=sum(p.numel() for p in held.values()),
        frozen_bytes=other + sum(b.nbytes for b in module.buffers()),
        llm_bytes=sum(p.nbytes for p in llm),
        llm_trained=sum(p.numel() for p in llm if p.requires_grad),
        elsewhere=trained - sum(own),
    )


def planned(config: RunConfig, facts: Facts) -> tuple[Stage, StageModule]:
    """Make a stage and its module on the meta device, frozen as the config says."""
    plain = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pretrained=""),
        train=dataclasses.replace(config.train, device="cpu"),
    )
    stage = stage_class(config.stage)(plain)
    with torch.device("meta"):
        module = stage.meta_module(facts)
    set_trained(module, config.optim)
    return stage, module


def rehearse(config: RunConfig, facts: Facts, progress: float) -> Rehearsal:
    """Simulate rank 0's part of a step at a progress, in the world of `dist`."""
    stage, module = planned(config, facts)
    keep_own_rows(module, sharded_shapes(module))
    shape = step_shape(stage, config.blocks, progress)
    with FakeTensorMode(), LiveBytes() as live:
        materialize(module)
        for tensor in (*module.parameters(), *module.buffers()):
            live.add(tensor, "module")
        module.train()
        step = _FakeStep(stage, module, progress, live)
        return step.run(shape)


class _FakeStep:
    """Runs the schedule of one step; equal passes run once and are counted several times."""

    def __init__(self, stage: Stage, module: StageModule, progress: float, live: LiveBytes) -> None:
        self.stage, self.config, self.module = stage, stage.config, module
        self.progress, self.live = progress, live
        self.trained = [p for p in module.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._accumulated)
        self.rows: dict[int, dict[str, Tensor]] = {}  # cached features of a micro-batch, by block
        self.cached: dict[int, CachedLoss] = {}  # of a micro-batch, likewise
        self.recomputed: dict[int, int] = {}  # FLOPs of its second forward pass, likewise
        self.peaks: list[tuple[Peak, Peak]] = []  # of backward passes; see _backward

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.live.add(parameter.grad, GRADIENTS)

    def run(self, shape: StepShape) -> Rehearsal:
        """Run the schedule of the real step."""
        counts = Counter(micro.block for micro in shape.micro)
        sizes = {m.block: self._size(m, shape) for m in reversed(shape.micro)}
        flops: dict[tuple[str, int], int] = {}
        passes = list(schedule(shape.micro, self.stage.contrasts))
        for each in passes:
            if (each.kind, each.block) not in flops:
                count = self._run(each, sizes[each.block], counts[each.block])
                flops[each.kind, each.block] = count
        tokens = sum(
            n * sizes[block][0] * self._tokens(sizes[block]) for block, n in counts.items()
        )
        return Rehearsal(
            with_gradients=max((a for a, _ in self.peaks), key=lambda peak: peak.total),
            alone=max((b for _, b in self.peaks), key=lambda peak: peak.total),
            flops=sum(flops[each.kind, each.block] for each in passes),
            recomputed=sum(counts[block] * count for block, count in self.recomputed.items()),
            micros=sum(counts.values()),
            tokens=tokens,
        )

    def _size(self, micro: MicroBatch, shape: StepShape) -> Sizes:
        clip = self.config.data.sources[micro.source].modality == "video"
        frames = shape.frames if clip else 1
        return micro.stop - micro.start, frames, shape.resolution, micro.source

    def _tokens(self, size: Sizes) -> int:
        text = text_section(self.config)
        if text is not None and VISION not in self.stage.offers:
            return text.max_length
        return self.stage.tokens(*size[1:3])

    def _run(self, each: Pass, size: Sizes, count: int) -> int:
        """Run a pass and return its FLOPs."""
        if each.kind == "features":
            self._features(each.block, size)
        elif each.kind == "loss":
            self._loss(each.block, count)
        else:
            self._backward(each.block, size, count)
        return self.live.flops

    def _example(self, size: Sizes) -> Batch:
        self.live.kind = "batch"
        batch = self.stage.example_batch(self.module, *size)
        self.live.kind = "activations"
        self.live.reset()
        return batch

    def _autocast(self) -> Any:
        enabled = self.config.train.precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    def _features(self, block: int, size: Sizes) -> None:
        batch = self._example(size)
        with torch.no_grad(), self._autocast():
            self.rows[block] = self.module.features(batch, self.progress)

    def _loss(self, block: int, count: int) -> None:
        """Cache the gradients of a split block's features, which are kept during its backwards."""
        self.live.kind = "features"
        self.live.reset()
        rows = [self.rows.pop(block)] * count
        self.cached[block], *_ = cached_losses(self.module.loss_from_features, rows, training=True)

    def _backward(self, block: int, size: Sizes, count: int) -> None:
        """Record the peaks with and without gradients."""
        live, cached, batch = self.live, self.cached.get(block), self._example(size)
        if cached is not None:
            batch |= cached.constants
        with self._autocast():
            features = self.module.features(batch, self.progress)
            if cached is None:
                live.kind = "logits"
                loss = self.module.loss_from_features(features).loss
                live.kind = "activations"
        if cached is not None:
            self.recomputed[block] = live.flops
            loss = surrogate_loss(features, cached.gradients)
        del features
        loss.backward()
        first, bare = _peak(live.peak), _peak(live.bare)
        if self.peaks or count > 1:  # all gradients of the micro-batches before it are there
            whole = sum(4 * parameter.numel() for parameter in self.trained)
            later = dataclasses.replace(bare, gradients=whole)
            first = max(first, later, key=lambda peak: peak.total)
        self.peaks.append((first, bare))
        self.module.zero_grad()


def _peak(held: dict[str, int]) -> Peak:
    kinds = ("activations", "logits", "batch", "features", GRADIENTS)
    return Peak(*(held.get(kind, 0) for kind in kinds))


def starts_of(config: RunConfig) -> Sequence[float]:
    """List points of progress, ascending and below 1, at which the cost of a step changes."""
    schedules = config.train.micro_batch, config.data.resolution, config.data.frames
    starts = {start for schedule in schedules for start, _ in steps_of(schedule)}
    starts |= {config.optim.vision.frozen_until, config.optim.text.frozen_until}
    starts |= {point for span in moving(config) for point in span}
    return sorted(start for start in starts if start < 1)


def moving(config: RunConfig) -> list[tuple[float, float]]:
    """List the parts of the progress in which a schedule changes at every step."""
    return stage_class(config.stage)(config).spans()
