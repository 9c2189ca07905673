"""Estimate of a stage's memory, FLOPs, hours and checkpoint size, and settings that make it fit.

The bytes of a micro-batch come from `fake_step.py`. The rest is arithmetic on the numbers of
parameters, for DeepSpeed as `engine.py` sets it up (fp32 weights, bf16 by autocast). DeepSpeed's
own buffers follow its version 0.19 and were measured by `tools/benchmarks/bench_memory.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from data_pipelines.stream.sampling import local_samples
from stages import stage_class
from stages.base import Facts
from xray import dist
from xray.artifacts.offers import VISION
from xray.config import RunConfig
from xray.config.model import Checkpointing
from xray.config.schedule import steps_of
from xray.optim import SLOTS, reduce_bucket
from xray.planning.fake_step import Peak, Rehearsal, Size, moving, rehearse, size_of, starts_of
from xray.training.gpu_specs import Gpu
from xray.training.state import FILE_BYTES

LIVE = 1_000_000_000  # parameters that ZeRO 3 leaves gathered (stage3_max_live_parameters)
FP32 = 4
ZeroStage = Literal[0, 1, 2, 3]
SLICES = 3  # simulated steps of a part in which every step differs


@dataclass(frozen=True)
class Memory:
    """Peak memory of a device in bytes, by part; host: its share of the host's memory."""

    weights: int
    llm: int  # weights of the text tower
    gradients: int
    optimizer: int  # moments, the weights' average, and ZeRO's own copy of the weights
    activations: int
    logits: int
    batch: int
    buffers: int  # DeepSpeed's: buckets, gathered weights, copies
    host: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self)) - self.host


@dataclass(frozen=True)
class Resources:
    """Estimate of a stage for one of `world` devices."""

    config: RunConfig
    world: int
    size: Size
    memory: Memory
    flops: float  # per step over all devices, mean over the stage
    recomputed: float  # FLOPs of these for the gradient cache's second forward passes
    tokens: float  # per step over all devices, mean over the stage
    micros: int  # micro-batches per step, maximum over the stage

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: trained fp32 weights, their average if it is kept, moments."""
        return _saved(self.config, self.size.trained)

    def hours(self, gpu: Gpu, mfu: float) -> float:
        """Estimate the hours of the stage at a model FLOPs utilisation of `mfu`."""
        peak = gpu.peak(self.config.train.precision)
        return self.config.steps * self.flops / (self.world * peak * mfu) / 3600


def resources(config: RunConfig, facts: Facts, world: int) -> Resources:
    """Estimate a stage on `world` devices; raises ConfigError for blocks that do not divide."""
    with dist.rehearsed(world):
        size = size_of(config, facts)
        points = _points(config)
        steps = {at: rehearse(config, facts, at) for at in points}
    memories = [memory_of(config, size, steps[start], world) for start in starts_of(config)]

    def mean(what: str) -> float:
        return world * sum(share * getattr(steps[at], what) for at, share in points.items())

    memory = max(memories, key=lambda memory: memory.total)
    micros = max(step.micros for step in steps.values())
    means = mean("flops"), mean("recomputed"), mean("tokens")
    return Resources(config, world, size, memory, *means, micros)


def _points(config: RunConfig) -> dict[float, float]:
    """Choose points of progress to simulate, each with the share of the stage that it represents.

    After a sudden change, its start. While a step changes gradually (keep rate, masks), the middles
    of SLICES parts, and the start for its memory only.
    """
    starts, spans = starts_of(config), moving(config)
    points: dict[float, float] = {}
    for start, end in zip(starts, [*starts[1:], 1.0], strict=True):
        moves = any(begin <= start < stop for begin, stop in spans)
        points[start] = 0.0 if moves else end - start
        if moves:
            part = (end - start) / SLICES
            points |= {start + (number + 0.5) * part: part for number in range(SLICES)}
    return points


# memory ---------------------------------------------------------------------------------------


def memory_of(config: RunConfig, size: Size, rehearsal: Rehearsal, world: int) -> Memory:
    """Compute the peak memory of a step: in the backward pass, or in the optimizer's update."""
    stage, offload = config.zero.stage, config.zero.offload
    slots = _slots(config)
    trained = FP32 * (size.trained - size.elsewhere)
    own = trained if stage == 0 else -(-trained // world)
    held = size.frozen_bytes + trained - FP32 * size.llm_trained
    llm = size.llm_bytes
    if stage == 3:
        held, llm = (0 if offload else -(-part // world) for part in (held, llm))
    masters = own if stage in (1, 2) else 0
    optimizer = slots * own + masters
    peak, gradients, buffers = _backward(config, size, rehearsal, own)
    kept = _kept(config, size, own)
    buffers += kept
    update = 2 * FP32 * size.largest if stage == 0 else 3 * own
    host = _copied(config, size, world) if config.train.save_in_background else 0
    if offload:
        host += optimizer + own + (own if stage < 3 else (size.frozen_bytes + trained) // world)
        optimizer, update = 0, 0
        buffers += 2 * FP32 * size.largest if stage < 3 else 0
    in_backward = peak.total - peak.gradients + gradients + buffers
    steady = trained if stage == 0 else own if stage == 3 else 0
    in_update = steady + update + kept
    parts = (held, llm, gradients, optimizer, peak.activations + peak.features)
    if in_backward >= in_update:
        return Memory(*parts, peak.logits, peak.batch, buffers, host)
    return Memory(held, llm, steady, optimizer, 0, 0, 0, update + kept, host)


def _copied(config: RunConfig, size: Size, world: int) -> int:
    """Count the bytes of a rank's files of a checkpoint, which it copies to save them."""
    whole, file = _saved(config, size.trained), max(FILE_BYTES, _saved(config, size.largest))
    return min(whole, -(-whole // (file * world)) * file)


def _saved(config: RunConfig, values: int) -> int:
    """Count the bytes of trained values and their slots in a checkpoint."""
    return FP32 * values * (1 + _slots(config))


def _slots(config: RunConfig) -> int:
    """Count the values kept for each trained value: moments, and its average."""
    return len(SLOTS[config.optim.name]) + (config.train.ema > 0)


def _kept(config: RunConfig, size: Size, own: int) -> int:
    """Count the bytes that ZeRO 3 always holds: buckets, a gradient buffer, gathered weights."""
    if config.zero.stage < 3:
        return 0
    whole = FP32 * size.trained + size.frozen_bytes + size.llm_bytes - FP32 * size.llm_trained
    gathered = min(whole, FP32 * LIVE)
    gradients = 0 if config.zero.offload else own
    return FP32 * reduce_bucket(config.zero, size.trained) + gradients + gathered


def _backward(
    config: RunConfig, size: Size, rehearsal: Rehearsal, own: int
) -> tuple[Peak, int, int]:
    """Return (micro-batch, gradients, DeepSpeed's buffers) at the peak of a backward pass."""
    stage, trained = config.zero.stage, FP32 * size.trained
    before = rehearsal.micros > 1  # gradients of earlier micro-batches exist
    if stage == 0:
        return rehearsal.with_gradients, rehearsal.with_gradients.gradients, 0
    alone = rehearsal.alone
    if stage == 3:
        copies = 2 * FP32 * reduce_bucket(config.zero, size.trained)  # of a bucket, for the scatter
        return alone, own, max(0, copies - alone.total)
    accumulated = before * (trained if stage == 1 else own)
    end = own + before * (2 * own if stage == 2 else 0)  # when all activations are freed
    rest = max(0, end - alone.total - accumulated)
    return alone, accumulated, rest + FP32 * reduce_bucket(config.zero, size.trained)


# what makes it fit ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Settings to change, and the memory with them."""

    settings: dict[str, Any]
    memory: Memory

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


def cheapest_fit(config: RunConfig, facts: Facts, world: int, capacity: float) -> Change | None:
    """Find the cheapest change that fits into `capacity` bytes, or None.

    By cost: smaller micro-batches, ZeRO 1, 2 and 3 with them, gradient checkpointing, offloading.
    """

    @functools.cache
    def rehearsed(micro: int | None, checkpointing: Checkpointing) -> tuple[Size, list[Rehearsal]]:
        changed = _changed(config, micro, checkpointing)
        with dist.rehearsed(world):
            steps = [rehearse(changed, facts, start) for start in starts_of(changed)]
            return size_of(changed, facts), steps

    for stage, checkpointing, offload in _rungs(config):
        for micro in (None, *_smaller(config, world)):
            size, steps = rehearsed(micro, checkpointing)
            changed = _changed(config, micro, checkpointing)
            changed.zero = dataclasses.replace(config.zero, stage=stage, offload=offload)
            memory = max((memory_of(changed, size, r, world) for r in steps), key=lambda m: m.total)
            if memory.total <= capacity:
                return Change(_difference(config, changed, micro), memory)
            if memory.weights + memory.llm + memory.optimizer > capacity:
                break  # no micro-batch can fit
    return None


def _rungs(config: RunConfig) -> Iterator[tuple[ZeroStage, Checkpointing, bool]]:
    """Yield (ZeRO stage, checkpointing, offload) from the current settings, cheapest first."""
    has, offload = config.model.grad_checkpointing, config.zero.offload
    known: Sequence[ZeroStage] = get_args(ZeroStage)
    stages = [n for n in known if config.zero.stage <= n <= config.zero_limit]
    yield from ((stage, has, offload) for stage in stages)
    if has is not True and VISION in stage_class(config.stage).offers:
        yield from ((stage, True, offload) for stage in stages)
    if not offload and config.zero_limit:
        yield from ((stage or 1, has, True) for stage in stages)
        yield from ((stage or 1, True, True) for stage in stages)


def _smaller(config: RunConfig, world: int) -> list[int]:
    """List micro-batches that divide every block's share, each at most half of the one before."""
    shares = [local_samples(block, world) for block in config.blocks]
    now = max(min(value or share, share)
              for _, value in steps_of(config.train.micro_batch) for share in shares)  # fmt: skip
    sizes, limit = [], now // 2
    for size in range(now // 2, 0, -1):
        if size <= limit and all(share % min(size, share) == 0 for share in shares):
            sizes.append(size)
            limit = size // 2
    return sizes


def _changed(config: RunConfig, micro: int | None, checkpointing: Checkpointing) -> RunConfig:
    model = dataclasses.replace(config.model, grad_checkpointing=checkpointing)
    changed = dataclasses.replace(config, model=model)
    if micro is not None:
        changed.train = dataclasses.replace(config.train, micro_batch=micro)
        changed.data = dataclasses.replace(config.data, tokens_per_batch=0)
    return changed


def _difference(config: RunConfig, changed: RunConfig, micro: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if micro is not None:
        settings["train.micro_batch"] = micro
        if config.data.tokens_per_batch:
            settings["data.tokens_per_batch"] = 0
    if changed.zero.stage != config.zero.stage:
        settings["zero.stage"] = changed.zero.stage
    if changed.model.grad_checkpointing != config.model.grad_checkpointing:
        settings["model.grad_checkpointing"] = "true"
    if changed.zero.offload != config.zero.offload:
        settings["zero.offload"] = "true"
    return settings
