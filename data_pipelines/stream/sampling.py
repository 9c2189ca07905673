"""Which sample is where: a pure function of (seed, manifest, step).

The epochs of a source follow each other in one endless virtual sequence of slots. An epoch permutes
the shards, and within groups of `shuffle_shards` shards permutes the slots: a slot's radius is its
group. With N slots per epoch and A lanes, round e takes the virtual positions
[A*c(e), A*c(e+1)) with c(e) = floor(e*N/A), and lane j the j-th of its A equal runs; what does not
divide is carried into the next round. After m samples lane j has given floor((m + j)/A): these sum
to m exactly, for every m. Nothing depends on ranks or workers.

Slots are permuted by a keyed bijection (`shuffle.py`), so nothing is ever as long as the data: an
epoch costs two columns over the shards.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.shards.source import Source
from data_pipelines.stream.shuffle import keys_of, permuted
from xray.config import BlockConfig, DataConfig
from xray.errors import ConfigError

ATTEMPTS = 20  # stand-ins tried for a bad sample before the run stops


@dataclass(frozen=True)
class SampleRef:
    """One sample to read: where it lies, and the position that seeds its randomness."""

    source: str
    shard: int
    slot: int
    position: int  # in the source's endless sequence
    resolution: int
    frames: int
    attempt: int = 0  # stand-ins passed over because the quarantine names what they replace


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


# What a stream of random numbers is for: no two uses share one.
PURPOSE = {"shards": 1, "slots": 2, "stand-in": 3}


class SamplePlan:
    """The endless sequence of one source, cut into lanes."""

    def __init__(self, source: Source, lanes: int, shuffle_shards: int, seed: int) -> None:
        self.source = source
        self.counts = source.counts
        self.total = int(self.counts.sum(dtype=np.int64))
        self.lanes = lanes
        self.group = max(1, shuffle_shards)
        self.entropy = [seed, zlib.crc32(source.name.encode())]
        self.quarantine: dict[int, set[int]] = {}  # shard -> members not to be tried
        # A step's lanes may be in two rounds, and a round may begin in the epoch before its own.
        self._epoch = functools.lru_cache(maxsize=3)(self._permute_shards)

    def positions(
        self, step: int, samples: int, start: int = 0, stop: int | None = None
    ) -> np.ndarray:
        """Virtual positions [start, stop) of a step's block, which is laid out lane by lane."""
        lanes = np.arange(self.lanes)
        before = (step * samples + lanes) // self.lanes
        after = ((step + 1) * samples + lanes) // self.lanes
        ends = np.cumsum(after - before)
        place = np.arange(start, samples if stop is None else stop)
        lane = np.searchsorted(ends, place, side="right")
        turn = after[lane] - ends[lane] + place  # of this lane since the beginning
        round_ = ((turn + 1) * self.lanes - 1) // self.total
        first = round_ * self.total // self.lanes
        length = (round_ + 1) * self.total // self.lanes - first
        return self.lanes * first + lane * length + (turn - first)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shards, slots) at virtual positions."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.total)
        shards, slots = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shards[here], slots[here] = self._locate(epoch, places[here])
        return shards, slots

    def _locate(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order, ends = self._epoch(epoch)
        groups, first, size = self._groups(ends, places)
        keys = keys_of([*self.entropy, PURPOSE["slots"], epoch], groups)
        moved = first + permuted(places - first, size, keys)
        which = np.searchsorted(ends, moved, side="right")
        shards = order[which].astype(np.int64)
        return shards, moved - (ends[which] - self.counts[shards])

    def _groups(
        self, ends: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(group, its first place, its number of places) of each place of an epoch."""
        groups = np.searchsorted(ends, places, side="right") // self.group
        last = np.minimum((groups + 1) * self.group, len(ends)) - 1
        first = np.where(groups > 0, ends[groups * self.group - 1], 0)
        return groups, first, ends[last] - first

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """A deterministic stand-in for a bad sample: at first from its own group of shards, whose
        tars are at hand, then from anywhere."""
        epoch, place = divmod(position, self.total)
        _, first, size = (
            int(values[0]) for values in self._groups(self._epoch(epoch)[1], np.array([place]))
        )
        if attempt >= ATTEMPTS // 2:
            first, size = 0, self.total
        draw = keys_of([*self.entropy, PURPOSE["stand-in"], attempt], np.array([position]))
        stand_in = epoch * self.total + first + int(draw[0] % np.uint64(size))
        shards, slots = self.locate(np.array([stand_in]))
        return int(shards[0]), int(slots[0])

    def candidate(self, position: int, attempt: int) -> tuple[int, int]:
        """(shard, slot) of the sample at a position, or of its stand-in number `attempt`."""
        if attempt:
            return self.replacement(position, attempt - 1)
        shards, slots = self.locate(np.array([position]))
        return int(shards[0]), int(slots[0])

    def quarantined(self, shard: int, slot: int) -> bool:
        members = self.quarantine.get(shard)
        return members is not None and self.source.member(shard, slot) in members

    def shards_ahead(self, positions: np.ndarray) -> np.ndarray:
        """The shards of the groups at these positions and half a group after them."""
        found = []
        for epoch in np.unique(positions // self.total).tolist():
            places = positions[positions // self.total == epoch] - epoch * self.total
            order, ends = self._epoch(epoch)
            groups, _, size = self._groups(ends, places)
            ahead = np.minimum(places + size // 2, self.total - 1)
            both = np.unique(np.concatenate([groups, self._groups(ends, ahead)[0]]))
            for group in both.tolist():
                found.append(order[group * self.group : (group + 1) * self.group])
        return np.unique(np.concatenate(found))

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard order, where each shard of that order ends) of an epoch."""
        rng = np.random.default_rng([*self.entropy, PURPOSE["shards"], epoch])
        order = rng.permutation(len(self.counts)).astype(np.int32)
        return order, np.cumsum(self.counts[order], dtype=np.int64)


def default_lanes(samples: int) -> int:
    """The largest power of two <= min(samples, 256)."""
    return 1 << (min(samples, 256).bit_length() - 1)


def micro_batches(
    blocks: Sequence[BlockConfig],
    sizes: Sequence[int],
    rank: int,
    world: int,
    tokens: Sequence[int] | None = None,
) -> list[MicroBatch]:
    """How a rank's share of a step is cut into forwards of sizes[block] samples; 0 = one forward.

    tokens: of a sample of each block, where a block without a weight is to count by its tokens
    instead of its samples. Raises ConfigError when a block does not divide over the ranks or its
    size.
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
    """A rank's share of a block; raises ConfigError when it does not divide."""
    if block.samples % world:
        lower = block.samples // world * world
        better = f"{lower} or {lower + world}" if lower else str(world)
        raise ConfigError(
            f"data.blocks: {block.samples} samples of {block.source!r} do not divide over "
            f"{world} processes: use {better}"
        )
    return block.samples // world


def within_budget(block: BlockConfig, world: int, tokens: int, budget: int) -> int:
    """The largest forward of a block that divides its share and stays within a token budget."""
    local = local_samples(block, world)
    most = max(1, budget // tokens)
    return max(size for size in range(1, local + 1) if local % size == 0 and size <= most)


def _block_weights(blocks: Sequence[BlockConfig], sizes: Sequence[int]) -> list[float]:
    parts = [block.samples * size for block, size in zip(blocks, sizes, strict=True)]
    raw = [
        part / sum(parts) if block.weight is None else block.weight
        for block, part in zip(blocks, parts, strict=True)
    ]
    return [weight / sum(raw) for weight in raw]


class StepSampler:
    """Yields the SampleRefs of each micro-batch of a rank, for a range of steps.

    same: every step has the samples of step 0.
    """

    def __init__(
        self,
        blocks: Sequence[BlockConfig],
        plans: dict[str, SamplePlan],
        shape: Callable[[int], StepShape],
        steps: range,
        same: bool = False,
    ) -> None:
        self.same = same
        self.blocks = blocks
        self.plans = plans
        self.shape = shape
        self.steps = steps
        self._asked: dict[int, set[int]] = {}  # block -> shards that were to be fetched last

    def __len__(self) -> int:
        return sum(len(self.shape(step).micro) for step in self.steps)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for step in self.steps:
            shape, drawn = self.shape(step), 0 if self.same else step
            self._prefetch(drawn, shape)
            for number in turned(len(shape.micro), step):
                yield self._refs(drawn, shape.micro[number], shape)

    def _refs(self, step: int, micro: MicroBatch, shape: StepShape) -> list[SampleRef]:
        plan = self.plans[micro.source]
        samples = self.blocks[micro.block].samples
        positions = plan.positions(step, samples, micro.start, micro.stop)
        shards, slots = plan.locate(positions)
        refs = []
        for place in zip(shards.tolist(), slots.tolist(), positions.tolist(), strict=True):
            shard, slot, position = place
            attempt = 0
            while plan.quarantined(shard, slot) and attempt < ATTEMPTS:
                attempt += 1
                shard, slot = plan.candidate(position, attempt)
            size = shape.resolution, shape.frames
            refs.append(SampleRef(micro.source, shard, slot, position, *size, attempt))
        return refs

    def _prefetch(self, step: int, shape: StepShape) -> None:
        """Have the remote shards fetched that this rank's lanes come to next."""
        for number, block in enumerate(self.blocks):
            plan = self.plans[block.source]
            mine = [micro for micro in shape.micro if micro.block == number]
            if plan.source.cache is None or not mine:
                continue
            positions = plan.positions(step, block.samples, mine[0].start, mine[-1].stop)
            ahead = set(plan.shards_ahead(positions).tolist())
            for shard in sorted(ahead - self._asked.get(number, set())):
                plan.source.prefetch(shard)
            self._asked[number] = ahead


def turned(count: int, step: int) -> list[int]:
    """The order in which a step's micro-batches go to the workers.

    Workers take them in turn: in the same order every time, one worker would get all the clips.
    """
    return [(number + step) % count for number in range(count)]


def make_plans(
    blocks: Sequence[BlockConfig], sources: dict[str, Source], data: DataConfig, seed: int
) -> dict[str, SamplePlan]:
    """A plan for each source that the blocks use."""
    plans = {}
    for block in blocks:
        lanes = data.lanes or default_lanes(block.samples)
        plans[block.source] = SamplePlan(sources[block.source], lanes, data.shuffle_shards, seed)
    return plans
