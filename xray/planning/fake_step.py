"""A step of a stage with fake tensors: what it would hold and compute, before anything runs.

The stage's own module and losses run, and the schedule is that of `accumulate.py`; of a block's
equal micro-batches one is run.
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

from data_pipelines.stream.sampling import StepShape
from stages import stage_class
from stages.base import Facts, StageModule
from xray.config.schedule import steps_of
from xray.optim import parameter_groups
from xray.planning.memory_tracker import LiveBytes, materialize
from xray.planning.meta_modules import example, sketch_module
from xray.training.step_shape import step_shape

GRADIENTS = "gradients"


@dataclass(frozen=True)
class Size:
    """A module's tensors, in values and in bytes."""

    trained: int  # values, all of them fp32
    largest: int  # of them in one parameter
    frozen: int  # values
    frozen_bytes: int  # but for the LLM
    llm_bytes: int  # of the text tower, trained or not
    llm_trained: int  # values


@dataclass(frozen=True)
class Peak:
    """Bytes beside weights and optimizer when a micro-batch holds most."""

    activations: int
    logits: int
    batch: int
    features: int  # of blocks that are cut, and their gradients
    gradients: int  # complete or not, where they are not partitioned

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.batch + self.features + self.gradients


@dataclass(frozen=True)
class Rehearsal:
    """A step on one rank at a point of the stage's progress."""

    with_gradients: Peak  # whole gradients lie beside the activations
    alone: Peak  # gradients counted elsewhere
    flops: int
    recomputed: int  # of them in forwards that are run for the gradient cache alone
    micros: int
    tokens: int  # of images and clips, before any are masked or reduced


def size_of(config: Any, facts: Facts) -> Size:
    """The parameters of a stage's module."""
    module = _trainable(config, facts)[0]
    trained = {n: p.numel() for n, p in module.named_parameters() if p.requires_grad}
    held = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    llm = [p for n, p in module.named_parameters() if n.startswith("towers.text.")]
    other = sum(p.nbytes for n, p in held.items() if not n.startswith("towers.text."))
    return Size(
        trained=sum(trained.values()),
        largest=max(trained.values(), default=0),
        frozen=sum(p.numel() for p in held.values()),
        frozen_bytes=other + sum(b.nbytes for b in module.buffers()),
        llm_bytes=sum(p.nbytes for p in llm),
        llm_trained=sum(p.numel() for p in llm if p.requires_grad),
    )


def _trainable(config: Any, facts: Facts) -> tuple[StageModule, int]:
    module, width = sketch_module(config, facts)
    parameter_groups(module, config.optim)  # takes out of training what is frozen throughout
    return module, width


def rehearse(config: Any, facts: Facts, progress: float) -> Rehearsal:
    """Run rank 0's part of a step at a progress, in the world of `dist`."""
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, device="cpu"))
    stage = stage_class(config.stage)(plain)
    module, width = _trainable(config, facts)
    shape = step_shape(stage, config.blocks, progress)
    with FakeTensorMode(), LiveBytes() as live:
        materialize(module)
        for tensor in (*module.parameters(), *module.buffers()):
            live.add(tensor, "module")
        module.train()
        run = _Step(config, module, width, progress, live)
        return run.all(shape, stage.spans_batch)


class _Step:
    """The micro-batches of one step, one for each block."""

    def __init__(
        self, config: Any, module: StageModule, width: int, progress: float, live: LiveBytes
    ) -> None:
        self.config, self.module, self.width = config, module, width
        self.progress, self.live = progress, live
        self.trained = [p for p in module.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._accumulated)
        self.flops = self.recomputed = 0

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.live.add(parameter.grad, GRADIENTS)

    def all(self, shape: StepShape, spans: bool) -> Rehearsal:
        counts = Counter(micro.block for micro in shape.micro)
        firsts = [next(m for m in shape.micro if m.block == block) for block in counts]
        sizes = {m.block: self._size(m.block, m.stop - m.start, shape) for m in firsts}
        slopes = {
            block: self._contrast(sizes[block], count)
            for block, count in counts.items()
            if spans and count > 1
        }
        found: list[tuple[Peak, Peak]] = []
        whole = sum(4 * parameter.numel() for parameter in self.trained)
        for number, (block, count) in enumerate(counts.items()):
            first, bare = self._micro(sizes[block], count, slopes.get(block))
            if number or count > 1:  # the gradients of those before it are there
                later = dataclasses.replace(bare, gradients=whole)
                first = max(first, later, key=lambda peak: peak.total)
            found.append((first, bare))
            self.module.zero_grad()
        tokens = sum(
            count * sizes[block][0] * self._tokens(sizes[block]) for block, count in counts.items()
        )
        return Rehearsal(
            with_gradients=max((a for a, _ in found), key=lambda peak: peak.total),
            alone=max((b for _, b in found), key=lambda peak: peak.total),
            flops=self.flops,
            recomputed=self.recomputed,
            micros=sum(counts.values()),
            tokens=tokens,
        )

    def _size(self, block: int, samples: int, shape: StepShape) -> tuple[int, int, int]:
        source = self.config.blocks[block].source
        clip = self.config.data.sources[source].modality == "video"
        return samples, shape.frames if clip else 1, shape.resolution

    def _tokens(self, size: tuple[int, int, int]) -> int:
        if self.config.stage == "text":
            return int(self.config.text.max_length)
        return stage_class(self.config.stage)(self.config).tokens(*size[1:])

    def _autocast(self) -> Any:
        enabled = self.config.train.precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    def _example(self, size: tuple[int, int, int]) -> Any:
        self.live.kind = "batch"
        batch = example(self.config, self.module, size, self.width)
        self.live.kind = "activations"
        return batch

    def _micro(
        self, size: tuple[int, int, int], count: int, slopes: dict[str, Tensor] | None
    ) -> tuple[Peak, Peak]:
        """(the most with its own gradients as they come, the most without any)."""
        live, batch = self.live, self._example(size)
        live.reset()
        with self._autocast():
            features = self.module.features(batch, self.progress)
            if slopes is None:
                live.kind = "logits"
                loss = self.module.loss_from_features(features).loss
                live.kind = "activations"
        if slopes is not None:
            parts = [
                (features[name] * (slope[: size[0]] if slope.ndim else slope)).sum()
                for name, slope in slopes.items()
            ]
            loss = torch.stack(parts).sum()
        del features
        loss.backward()
        self.flops += count * live.flops
        return _peak(live.peak), _peak(live.bare)

    def _contrast(self, size: tuple[int, int, int], count: int) -> dict[str, Tensor]:
        """The features' gradients of a block that is cut, which are kept until it is through."""
        live, batch = self.live, self._example(size)
        live.reset()
        with torch.no_grad(), self._autocast():
            row = self.module.features(batch, self.progress)
        self.flops += count * live.flops
        self.recomputed += count * live.flops
        live.kind = "features"
        leaves = {
            name: torch.zeros((count * len(v), *v.shape[1:]) if v.ndim else (), dtype=v.dtype)
            for name, v in row.items()
        }
        for leaf in leaves.values():
            leaf.requires_grad_()
        live.reset()
        loss = self.module.loss_from_features(leaves).loss
        grads = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
        self.flops += live.flops
        live.kind = "activations"
        return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def _peak(held: dict[str, int]) -> Peak:
    kinds = ("activations", "logits", "batch", "features", GRADIENTS)
    return Peak(*(held.get(kind, 0) for kind in kinds))


def starts_of(config: Any) -> Sequence[float]:
    """The points of progress from which on a step is another one."""
    schedules = config.train.micro_batch, config.data.resolution, config.data.frames
    starts = {start for schedule in schedules for start, _ in steps_of(schedule)}
    starts |= {config.optim.vision.freeze, config.optim.text.freeze}
    starts |= {point for span in moving(config) for point in span}
    if config.stage == "clip":
        starts.add(config.clip.mask_until)
    return sorted(start for start in starts if start < 1)


def moving(config: Any) -> list[tuple[float, float]]:
    """The parts of a stage in which a schedule moves on and on."""
    spans = []
    reduces = config.stage in ("hashtag", "clip") and config.model.reduce != "none"
    if reduces and min(config.model.final_rates) < 1:
        spans.append(config.model.keep_rate_span)
    if config.stage == "clip" and config.clip.mask_ratio:
        spans.append(config.clip.mask_span)
    return [(start, end) for start, end in spans]
