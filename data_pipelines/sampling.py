"""Which sample is where: a pure function of (seed, manifest, step).

The epochs of a source follow each other in one endless virtual sequence of slots. An epoch permutes
the shards, and within groups of `shuffle_shards` shards permutes the slots: a slot's radius is its
group. With N slots per epoch and A lanes, round e takes the virtual positions
[A*c(e), A*c(e+1)) with c(e) = floor(e*N/A), and lane j the j-th of its A equal runs; what does not
divide is carried into the next round. After m samples lane j has given floor((m + j)/A): these sum
to m exactly, for every m. Nothing depends on ranks or workers.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.shards import Source
from xray.config import BlockConfig, DataConfig
from xray.errors import ConfigError


@dataclass(frozen=True)
class SampleRef:
    """One sample to read: where it lies, and the position that seeds its randomness."""

    source: str
    shard: int
    member: int
    position: int  # in the source's endless sequence
    resolution: int
    frames: int


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes of a block on one rank."""

    block: int
    source: str
    start: int  # within the block
    stop: int
    scale: float  # the loss's factor, so that the step's gradient is the weighted mean of blocks


@dataclass(frozen=True)
class StepShape:
    """How large a step's samples are, and how the step is cut into forwards on one rank."""

    resolution: int
    frames: int
    micro: list[MicroBatch]


class SamplePlan:
    """The endless sequence of one source, cut into lanes."""

    def __init__(self, source: Source, lanes: int, shuffle_shards: int, seed: int) -> None:
        self.source = source
        self.counts = source.counts
        self.total = int(self.counts.sum())
        self.lanes = lanes
        self.group = max(1, shuffle_shards)
        self.entropy = [seed, zlib.crc32(source.name.encode())]
        self._epoch = functools.lru_cache(maxsize=4)(self._permute_shards)
        self._slots = functools.lru_cache(maxsize=8)(self._permute_group)

    def positions(self, step: int, samples: int) -> np.ndarray:
        """Virtual positions of a step's block, laid out lane by lane: [samples]."""
        before = (step * samples + np.arange(self.lanes)) // self.lanes
        after = ((step + 1) * samples + np.arange(self.lanes)) // self.lanes
        lane = np.repeat(np.arange(self.lanes), after - before)
        first = np.repeat(np.cumsum(after - before) - (after - before), after - before)
        turn = np.repeat(before, after - before) + np.arange(samples) - first
        round_ = ((turn + 1) * self.lanes - 1) // self.total
        start = round_ * self.total // self.lanes
        length = (round_ + 1) * self.total // self.lanes - start
        return self.lanes * start + lane * length + (turn - start)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, member) at a virtual position."""
        epoch, place = divmod(position, self.total)
        _, starts = self._epoch(epoch)
        group = int(np.searchsorted(starts, place, side="right")) - 1
        shards, slots, bounds = self._slots(epoch, group)
        slot = int(slots[place - starts[group]])
        which = int(np.searchsorted(bounds, slot, side="right")) - 1
        shard = int(shards[which])
        return shard, int(self.source.slots[shard][slot - bounds[which]])

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """A deterministic stand-in for a bad sample at this position."""
        rng = np.random.default_rng([*self.entropy, position, attempt])
        return self.locate(int(rng.integers(self.total)))

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard order, first slot of each group) of an epoch."""
        order = np.random.default_rng([*self.entropy, epoch]).permutation(len(self.counts))
        ends = np.cumsum(self.counts[order])
        return order, np.concatenate([[0], ends[self.group - 1 : -1 : self.group]])

    def _permute_group(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shards, permuted slots, first slot of each shard) of a group."""
        order, _ = self._epoch(epoch)
        shards = order[group * self.group : (group + 1) * self.group]
        bounds = np.concatenate([[0], np.cumsum(self.counts[shards])])
        rng = np.random.default_rng([*self.entropy, epoch, group])
        return shards, rng.permutation(int(bounds[-1])), bounds[:-1]


def default_lanes(samples: int) -> int:
    """The largest power of two <= min(samples, 256)."""
    return 1 << (min(samples, 256).bit_length() - 1)


def micro_batches(
    blocks: Sequence[BlockConfig], micro_batch: int, rank: int, world: int
) -> list[MicroBatch]:
    """How a rank's share of a step is cut into forwards; micro_batch 0 = one forward per block.

    Raises ConfigError when a block does not divide over the ranks or the micro-batch.
    """
    shares = _block_weights(blocks)
    cut: list[tuple[int, int, int]] = []  # block, size, count
    for number, block in enumerate(blocks):
        if block.samples % world:
            lower = block.samples // world * world
            better = f"{lower} or {lower + world}" if lower else str(world)
            raise ConfigError(
                f"data.blocks: {block.samples} samples of {block.source!r} do not divide over "
                f"{world} processes: use {better}"
            )
        local = block.samples // world
        size = min(micro_batch or local, local)
        if local % size:
            raise ConfigError(
                f"train.micro_batch={size} does not divide the {local} samples of "
                f"{block.source!r} per process: use a divisor of {local}"
            )
        cut.append((number, size, local // size))
    total = sum(count for _, _, count in cut)
    result = []
    for number, size, count in cut:
        start = rank * size * count
        for micro in range(count):
            low = start + micro * size
            scale = shares[number] * total / count
            result.append(MicroBatch(number, blocks[number].source, low, low + size, scale))
    return result


def _block_weights(blocks: Sequence[BlockConfig]) -> list[float]:
    samples = sum(block.samples for block in blocks)
    raw = [block.samples / samples if b is None else b for block in blocks for b in [block.weight]]
    return [weight / sum(raw) for weight in raw]


class StepSampler:
    """Yields the SampleRefs of each micro-batch of a rank, for a range of steps."""

    def __init__(
        self,
        blocks: Sequence[BlockConfig],
        plans: dict[str, SamplePlan],
        shape: Callable[[int], StepShape],
        steps: range,
    ) -> None:
        self.blocks = blocks
        self.plans = plans
        self.shape = shape
        self.steps = steps

    def __len__(self) -> int:
        return sum(len(self.shape(step).micro) for step in self.steps)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for step in self.steps:
            shape = self.shape(step)
            for micro in shape.micro:
                plan = self.plans[micro.source]
                block = plan.positions(step, self.blocks[micro.block].samples)
                yield [
                    SampleRef(micro.source, *plan.locate(p), p, shape.resolution, shape.frames)
                    for p in block[micro.start : micro.stop].tolist()
                ]


def make_plans(
    blocks: Sequence[BlockConfig], sources: dict[str, Source], data: DataConfig, seed: int
) -> dict[str, SamplePlan]:
    """A plan for each source that the blocks use."""
    plans = {}
    for block in blocks:
        lanes = data.lanes or default_lanes(block.samples)
        plans[block.source] = SamplePlan(sources[block.source], lanes, data.shuffle_shards, seed)
    return plans
