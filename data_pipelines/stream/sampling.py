"""Sampling plan: the samples of each step, as a pure function of (seed, manifest, step).

Sequence. The epochs of a source form one endless sequence of slots, numbered by virtual positions.
Each epoch permutes the shards. Within each group of `shuffle_shards` consecutive shards it also
permutes the slots, so a sample is shuffled only within its group.

Lanes. The sequence is read by A lanes in parallel. Let an epoch have N slots. Round e covers the
virtual positions [A*c(e), A*c(e+1)) with c(e) = floor(e*N/A). It is cut into A equal runs, and lane
j reads run j. If N does not divide by A, the remaining slots belong to the next round. After m
samples in total, lane j has read floor((m + j)/A) samples; the sum over the lanes is exactly m.
Nothing depends on the number of ranks or workers.

Memory. Slots are permuted by a keyed bijection (`shuffle.py`), so no array is as long as the data.
An epoch needs two columns over the shards.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data_pipelines.shards.source import Source
from data_pipelines.stream.shuffle import keys_of, permuted
from xray.config import BlockConfig, DataConfig
from xray.errors import ConfigError

ATTEMPTS = 20  # samples tried for one position before the run stops
PART = 64  # images, or frames of clips, that a worker reads at a time


@dataclass(frozen=True)
class SampleRef:
    """Reference to a sample to read: its slot, and the position that seeds its random draws."""

    source: str
    shard: int
    slot: int
    position: int  # virtual position in the endless sequence of the source
    resolution: int
    frames: int
    attempt: int = 0  # candidates already skipped because they are in quarantine
    view: int = 0  # number of this view of the sample, from 1; 0 = there is one


@dataclass(frozen=True)
class MicroBatch:
    """Samples of a block that one rank processes in one forward pass."""

    block: int
    source: str
    start: int  # within the block
    stop: int
    scale: float  # factor of the loss; makes the step's gradient the weighted mean over blocks


class Part(NamedTuple):
    """Samples of a micro-batch that one worker reads at a time."""

    number: int  # of the micro-batch in the step
    start: int  # within the block
    stop: int


@dataclass(frozen=True)
class StepShape:
    """Sizes of the samples of a step, and the micro-batches of one rank."""

    resolution: int
    frames: int
    micro: list[MicroBatch]


# Each use of random numbers has a separate stream.
PURPOSE = {"shards": 1, "slots": 2, "stand-in": 3}


class SamplePlan:
    """Endless sequence of the samples of one source, divided into lanes."""

    def __init__(self, source: Source, lanes: int, shuffle_shards: int, seed: int) -> None:
        self.source = source
        self.counts = source.counts
        self.total = int(self.counts.sum(dtype=np.int64))
        self.lanes = lanes
        self.group = max(1, shuffle_shards)
        self.entropy = [seed, zlib.crc32(source.name.encode())]
        self.quarantine: dict[int, set[int]] = {}  # shard -> members that are skipped
        # The lanes of a step may be in two rounds, and round e may begin in epoch e - 1.
        self._epoch = functools.lru_cache(maxsize=3)(self._permute_shards)

    def positions(
        self, step: int, samples: int, start: int = 0, stop: int | None = None
    ) -> np.ndarray:
        """Return the virtual positions of samples [start, stop) of a block at a step.

        samples: size of the block. Its samples are ordered by lane.
        """
        lanes = np.arange(self.lanes)
        before = (step * samples + lanes) // self.lanes
        after = ((step + 1) * samples + lanes) // self.lanes
        ends = np.cumsum(after - before)
        index = np.arange(start, samples if stop is None else stop)
        lane = np.searchsorted(ends, index, side="right")
        turn = after[lane] - ends[lane] + index  # samples that the lane has read before
        round_ = ((turn + 1) * self.lanes - 1) // self.total
        first = round_ * self.total // self.lanes
        length = (round_ + 1) * self.total // self.lanes - first
        return self.lanes * first + lane * length + (turn - first)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (shards, slots) at virtual positions."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.total)
        shards, slots = np.empty(len(offsets), np.int64), np.empty(len(offsets), np.int64)
        for epoch in np.unique(epochs).tolist():
            mask = epochs == epoch
            shards[mask], slots[mask] = self._locate(epoch, offsets[mask])
        return shards, slots

    def _locate(self, epoch: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (shards, slots) at offsets within an epoch."""
        order, ends = self._epoch(epoch)
        groups, first, size = self._groups(ends, offsets)
        keys = keys_of([*self.entropy, PURPOSE["slots"], epoch], groups)
        shuffled = first + permuted(offsets - first, size, keys)
        rank = np.searchsorted(ends, shuffled, side="right")  # in the order of the shards
        shards = order[rank].astype(np.int64)
        return shards, shuffled - (ends[rank] - self.counts[shards])

    def _groups(
        self, ends: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (group, first offset of the group, slots in the group) for offsets in an epoch."""
        groups = np.searchsorted(ends, offsets, side="right") // self.group
        last = np.minimum((groups + 1) * self.group, len(ends)) - 1
        first = np.where(groups > 0, ends[groups * self.group - 1], 0)
        return groups, first, ends[last] - first

    def candidate(self, position: int, attempt: int) -> tuple[int, int]:
        """Return (shard, slot) of a position: attempt 0 = its sample, n = its n-th replacement.

        The first half of the replacements are from the same group of shards, whose tars are already
        downloaded. Later ones are drawn from the whole epoch.
        """
        if attempt:
            epoch, offset = divmod(position, self.total)
            groups = self._groups(self._epoch(epoch)[1], np.array([offset]))
            first, size = int(groups[1][0]), int(groups[2][0])
            if attempt > ATTEMPTS // 2:
                first, size = 0, self.total
            draw = keys_of([*self.entropy, PURPOSE["stand-in"], attempt - 1], np.array([position]))
            position = epoch * self.total + first + int(draw[0] % np.uint64(size))
        shards, slots = self.locate(np.array([position]))
        return int(shards[0]), int(slots[0])

    def quarantined(self, shard: int, slot: int) -> bool:
        """Check if the sample of a slot is in quarantine."""
        members = self.quarantine.get(shard)
        return members is not None and self.source.member(shard, slot) in members

    def shards_ahead(self, positions: np.ndarray) -> np.ndarray:
        """Return the shards of the groups at these positions and half a group later."""
        shards = []
        for epoch in np.unique(positions // self.total).tolist():
            offsets = positions[positions // self.total == epoch] - epoch * self.total
            order, ends = self._epoch(epoch)
            groups, _, size = self._groups(ends, offsets)
            ahead = np.minimum(offsets + size // 2, self.total - 1)
            both = np.unique(np.concatenate([groups, self._groups(ends, ahead)[0]]))
            for group in both.tolist():
                shards.append(order[group * self.group : (group + 1) * self.group])
        return np.unique(np.concatenate(shards))

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (shards in the order of an epoch, offset at which each of them ends)."""
        rng = np.random.default_rng([*self.entropy, PURPOSE["shards"], epoch])
        order = rng.permutation(len(self.counts)).astype(np.int32)
        return order, np.cumsum(self.counts[order], dtype=np.int64)


def default_lanes(samples: int) -> int:
    """Return the largest power of two <= min(samples, 256)."""
    return 1 << (min(samples, 256).bit_length() - 1)


def micro_batches(
    blocks: Sequence[BlockConfig],
    sizes: Sequence[int],
    rank: int,
    world: int,
    tokens: Sequence[int] | None = None,
) -> list[MicroBatch]:
    """Cut a rank's samples of a step into micro-batches.

    sizes: samples per micro-batch of each block; 0 = the whole block of the rank. tokens: tokens
    per sample of each block; blocks without a weight are then weighted by tokens instead of
    samples. Raises ConfigError if a block does not divide by the world size or by its micro-batch.
    """
    shares = _block_weights(blocks, tokens or [1] * len(blocks))
    cut: list[tuple[int, int, int]] = []  # block, size, count
    for number, (block, wanted) in enumerate(zip(blocks, sizes, strict=True)):
        local = local_samples(block, world)
        size = min(wanted or local, local)
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


def local_samples(block: BlockConfig, world: int) -> int:
    """Return the samples of a block per rank; raises ConfigError if they do not divide."""
    if block.samples % world:
        lower = block.samples // world * world
        better = f"{lower} or {lower + world}" if lower else str(world)
        raise ConfigError(
            f"data.blocks: {block.samples} samples of {block.source!r} do not divide over "
            f"{world} processes: use {better}"
        )
    return block.samples // world


def within_budget(block: BlockConfig, world: int, tokens: int, budget: int) -> int:
    """Return the largest micro-batch of a block that keeps to a token budget.

    tokens: tokens per sample. budget: tokens per micro-batch. The result divides the samples of the
    block per rank, and is at least 1.
    """
    local = local_samples(block, world)
    most = max(1, budget // tokens)
    return max(size for size in range(1, local + 1) if local % size == 0 and size <= most)


def _block_weights(blocks: Sequence[BlockConfig], sizes: Sequence[int]) -> list[float]:
    """Return the weights of the blocks, with sum 1; the default is samples x size."""
    parts = [block.samples * size for block, size in zip(blocks, sizes, strict=True)]
    raw = [
        part / sum(parts) if block.weight is None else block.weight
        for block, part in zip(blocks, parts, strict=True)
    ]
    return [weight / sum(raw) for weight in raw]


@dataclass
class StepSampler:
    """Iterator over the SampleRefs of each part of a rank's micro-batches, for a range of steps."""

    blocks: Sequence[BlockConfig]
    plans: dict[str, SamplePlan]
    shape: Callable[[int], StepShape]
    steps: range
    same: bool = False  # use the samples of step 0 in every step (`debug.overfit_batch`)
    views: int = 1  # consecutive samples of a block that are views of the same one (`data.views`)
    # block -> shards of the last prefetch
    _prefetched: dict[int, set[int]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return sum(len(self.parts(step)) for step in self.steps)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for step in self.steps:
            shape, drawn = self.shape(step), 0 if self.same else step
            self._prefetch(drawn, shape)
            for part in self.parts(step):
                yield self._refs(drawn, part, shape)

    def parts(self, step: int) -> list[Part]:
        """Cut the micro-batches of a step into parts, in the order in which they are read.

        Workers get the parts in turn. With the same order in every step, one worker could get all
        clips, which take longest.
        """
        shape, parts = self.shape(step), list[Part]()
        for number, micro in enumerate(shape.micro):
            video = self.plans[micro.source].source.modality == "video"
            size = PART // shape.frames if video else PART
            size = max(self.views, size - size % self.views)
            for start in range(micro.start, micro.stop, size):
                parts.append(Part(number, start, min(start + size, micro.stop)))
        return [parts[(index + step) % len(parts)] for index in range(len(parts))]

    def _refs(self, step: int, part: Part, shape: StepShape) -> list[SampleRef]:
        micro = shape.micro[part.number]
        plan = self.plans[micro.source]
        views = self.views
        indices = np.arange(part.start, part.stop)
        positions = self._positions(step, micro.block, part.start, part.stop)[
            indices // views - part.start // views
        ]
        shards, slots = plan.locate(positions)
        refs = []
        numbers = indices % views + 1 if views > 1 else np.zeros_like(indices)
        located = zip(*(each.tolist() for each in (shards, slots, positions, numbers)), strict=True)
        for shard, slot, position, view in located:
            attempt = 0
            while plan.quarantined(shard, slot) and attempt < ATTEMPTS:
                attempt += 1
                shard, slot = plan.candidate(position, attempt)
            size = shape.resolution, shape.frames
            refs.append(SampleRef(micro.source, shard, slot, position, *size, attempt, view))
        return refs

    def _positions(self, step: int, number: int, start: int, stop: int) -> np.ndarray:
        """Return the positions of the distinct samples of which [start, stop) of a block are views.

        number: of the block.
        """
        block = self.blocks[number]
        distinct, stop = block.samples // self.views, -(-stop // self.views)
        return self.plans[block.source].positions(step, distinct, start // self.views, stop)

    def _prefetch(self, step: int, shape: StepShape) -> None:
        """Start to download the remote shards that the lanes of this rank read next."""
        for number, block in enumerate(self.blocks):
            plan = self.plans[block.source]
            micro = [part for part in shape.micro if part.block == number]
            if plan.source.cache is None or not micro:
                continue
            positions = self._positions(step, number, micro[0].start, micro[-1].stop)
            ahead = set(plan.shards_ahead(positions).tolist())
            for shard in sorted(ahead - self._prefetched.get(number, set())):
                plan.source.prefetch(shard)
            self._prefetched[number] = ahead


def make_plans(
    blocks: Sequence[BlockConfig], sources: dict[str, Source], data: DataConfig, seed: int
) -> dict[str, SamplePlan]:
    """Make a sampling plan for each source that the blocks use."""
    return {
        name: SamplePlan(sources[name], lanes, data.shuffle_shards, seed)
        for name, lanes in ((b.source, data.lanes or default_lanes(b.samples)) for b in blocks)
    }
