"""The sampling plan: exact, independent of the world size, shuffled, and small in memory."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from shards import numbered

from data_pipelines.shards.source import Source
from data_pipelines.stream.sampling import (
    SamplePlan,
    StepSampler,
    StepShape,
    default_lanes,
    micro_batches,
    within_budget,
)
from data_pipelines.stream.shuffle import keys_of, permuted
from xray.config import BlockConfig
from xray.errors import ConfigError

COUNTS = [7, 13, 1, 20, 9]
Slot = tuple[int, int]  # (shard, slot)


def slots_at(plan: SamplePlan, positions: np.ndarray | range | list[int]) -> list[Slot]:
    """List the slots at virtual positions."""
    shards, slots = plan.locate(np.asarray(positions))
    return list(zip(shards.tolist(), slots.tolist(), strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 256, 1000, 4097])
def test_the_shuffle_is_a_bijection(n: int) -> None:
    for key in keys_of([5], np.arange(3)):
        result = permuted(np.arange(n), np.full(n, n), np.full(n, key))
        assert sorted(result.tolist()) == list(range(n))


def test_the_shuffle_is_uniform() -> None:
    """The image of 0, and the distance of the images of 0 and 1, are uniform over keys.

    A chi-square test at 99.9 %.
    """
    n, trials = 20, 40_000
    keys, sizes = keys_of([1], np.arange(trials)), np.full(trials, n)
    first = permuted(np.zeros(trials, np.int64), sizes, keys)
    second = permuted(np.ones(trials, np.int64), sizes, keys)
    for values, bins in ((first, n), ((second - first) % n - 1, n - 1)):
        counts = np.bincount(values, minlength=bins)
        expected = trials / bins
        chi_square = ((counts - expected) ** 2 / expected).sum()
        # the 99.9 % quantile with 19 degrees of freedom is 43.8
        assert chi_square < 46, (bins, chi_square)


@pytest.mark.parametrize(("samples", "lanes"), [(8, 8), (10, 4), (3, 2), (64, 64), (7, 1)])
def test_every_slot_once_per_epoch(samples: int, lanes: int) -> None:
    plan = SamplePlan(numbered(COUNTS), lanes, 2, seed=3)
    total = sum(COUNTS)
    epochs = 6
    steps = epochs * total // samples
    positions = np.concatenate([plan.positions(k, samples) for k in range(steps)])
    assert len(set(positions.tolist())) == len(positions)  # no position occurs twice
    per_lane_spread = 2 * total  # a lane is ahead of another by less than two rounds
    assert positions.max() < steps * samples + per_lane_spread
    early = positions[positions // total < epochs - 3]
    assert np.bincount(early // total).tolist() == [total] * (epochs - 3)
    assert set(Counter(slots_at(plan, early)).values()) == {epochs - 3}


def test_positions_are_a_pure_function_and_epochs_are_shuffled() -> None:
    plan, again = (SamplePlan(numbered(COUNTS), 4, 2, seed=3) for _ in range(2))
    again.locate(again.positions(100, 10))
    assert np.array_equal(plan.positions(5, 10), again.positions(5, 10))
    assert slots_at(plan, plan.positions(5, 10)) == slots_at(again, again.positions(5, 10))
    total = sum(COUNTS)
    first, second = slots_at(plan, range(total)), slots_at(plan, range(total, 2 * total))
    assert first != second and sorted(first) == sorted(second)
    other = SamplePlan(numbered(COUNTS), 4, 2, seed=4)
    assert first != slots_at(other, range(total))


def test_shuffle_stays_within_groups_of_shards() -> None:
    plan = SamplePlan(numbered([10] * 6), 1, 2, seed=0)
    for group in range(3):
        shards = {shard for shard, _ in slots_at(plan, range(20 * group, 20 * group + 20))}
        assert len(shards) == 2


def test_replacements_are_deterministic_and_first_from_the_same_group() -> None:
    plan = SamplePlan(numbered([10] * 6), 1, 2, seed=0)
    group = {shard for shard, _ in slots_at(plan, range(20, 40))}
    tried = [plan.candidate(25, attempt) for attempt in range(20)]
    assert tried[0] == slots_at(plan, [25])[0]
    assert {shard for shard, _ in tried[1:11]} <= group
    assert not {shard for shard, _ in tried[11:]} <= group
    assert tried == [plan.candidate(25, attempt) for attempt in range(20)]
    assert len(set(tried)) > 10


def slots_of_steps(
    plan: SamplePlan, block: BlockConfig, steps: range, world: int
) -> list[list[Slot]]:
    """Return the slots that all ranks together read in each step."""
    result: list[list[Slot]] = [[] for _ in steps]
    for rank in range(world):
        shape = StepShape(32, 1, micro_batches([block], [0], rank, world))
        sampler = StepSampler([block], {block.source: plan}, lambda step, s=shape: s, steps)
        for step, batch in enumerate(sampler):
            result[step] += [(ref.shard, ref.slot) for ref in batch]
    return result


@pytest.mark.parametrize("world", [2, 3, 5, 15, 30])
def test_any_world_size_reads_the_same_steps(world: int) -> None:
    block = BlockConfig("photos", 30)
    plan = SamplePlan(numbered(COUNTS), 16, 2, seed=3)
    expected = slots_of_steps(plan, block, range(9), 1)
    assert slots_of_steps(plan, block, range(9), world) == expected
    assert slots_of_steps(plan, block, range(4, 9), world) == expected[4:]


def test_a_rank_reads_few_shards() -> None:
    """A rank reads lanes / world + 2 lanes at most, each within one or two groups of shards."""
    plan = SamplePlan(numbered([100] * 640), 64, 4, seed=0)
    block = BlockConfig("photos", 256)
    for rank in (0, 7, 15):
        (micro,) = micro_batches([block], [0], rank, 16)
        for step in (0, 50):
            shards, _ = plan.locate(plan.positions(step, 256, micro.start, micro.stop))
            assert len(set(shards.tolist())) <= (64 // 16 + 2) * 4 * 2
            assert set(shards.tolist()) <= set(
                plan.shards_ahead(plan.positions(step, 256, micro.start, micro.stop)).tolist()
            )


def test_shards_ahead_include_the_next_group() -> None:
    plan = SamplePlan(numbered([10] * 12), 1, 2, seed=0)
    for position, groups in ((0, 1), (9, 1), (10, 2), (19, 2)):
        shards = {shard for shard, _ in slots_at(plan, range(20 * groups))}
        assert set(plan.shards_ahead(np.array([position])).tolist()) == shards


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_divide_each_block(world: int) -> None:
    blocks = [BlockConfig("photos", 12), BlockConfig("clips", 24)]
    sizes = [1, 2] if world < 6 else [0, 0]
    cut = [micro_batches(blocks, sizes, rank, world) for rank in range(world)]
    for number, block in enumerate(blocks):
        taken = [
            i for rank in cut for m in rank if m.block == number for i in range(m.start, m.stop)
        ]
        assert taken == list(range(block.samples))
    for rank in cut:  # the engine divides by the number of micro-batches
        assert sum(m.scale for m in rank) / len(rank) == pytest.approx(1)


def test_blocks_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ConfigError, match="do not divide over 5 processes: use 10 or 15"):
        micro_batches([BlockConfig("photos", 12)], [0], 0, 5)
    with pytest.raises(ConfigError, match=r"train.micro_batch=5 does not divide"):
        micro_batches([BlockConfig("photos", 12)], [5], 0, 1)


def test_a_token_budget_sets_the_micro_batch_of_each_modality() -> None:
    images, clips = BlockConfig("photos", 96), BlockConfig("clips", 24)
    assert within_budget(images, 2, tokens=196, budget=196 * 16) == 16
    assert within_budget(clips, 2, tokens=784, budget=196 * 16) == 4  # the same number of tokens
    assert within_budget(clips, 2, tokens=784, budget=5 * 784) == 4  # 5 does not divide 12
    assert within_budget(clips, 1, tokens=784, budget=10**9) == 24
    assert within_budget(clips, 1, tokens=784, budget=1) == 1


def test_default_lanes() -> None:
    assert [default_lanes(n) for n in (1, 2, 3, 96, 256, 10_000)] == [1, 2, 2, 64, 256, 256]


def test_workers_get_every_modality() -> None:
    """With two micro-batches per step and two workers, for example, each worker gets both."""
    plans = {"photos": SamplePlan(numbered(COUNTS), 1, 2, seed=0)}
    for count, workers in ((2, 2), (4, 2), (3, 3), (4, 4), (1, 2)):
        shape = StepShape(32, 1, micro_batches([BlockConfig("photos", count)], [1], 0, 1))
        sampler = StepSampler([], plans, lambda step, s=shape: s, range(60))
        steps = [[part.number for part in sampler.parts(step)] for step in range(60)]
        assert all(sorted(step) == list(range(count)) for step in steps)
        flat = [number for step in steps for number in step]
        for worker in range(workers):
            assert set(flat[worker::workers]) == set(range(count))


def test_parts_cover_micro_batches_and_hold_a_limited_number_of_pictures() -> None:
    """150 photos and 10 clips of 16 frames per micro-batch, two of each in a step."""
    photos, clips = numbered(COUNTS), dataclasses.replace(numbered(COUNTS), modality="video")
    plans = {"photos": SamplePlan(photos, 1, 2, seed=0), "clips": SamplePlan(clips, 1, 2, seed=0)}
    blocks = [BlockConfig("photos", 300), BlockConfig("clips", 20)]
    shape = StepShape(32, 16, micro_batches(blocks, [150, 10], 0, 1))
    sampler = StepSampler(blocks, plans, lambda step: shape, range(3))
    for step in range(3):
        parts = sampler.parts(step)
        for number, micro in enumerate(shape.micro):
            mine = sorted(part for part in parts if part.number == number)
            covered = [index for part in mine for index in range(part.start, part.stop)]
            assert covered == list(range(micro.start, micro.stop))
            sizes = [part.stop - part.start for part in mine]
            assert sizes == ([64, 64, 22] if micro.source == "photos" else [4, 4, 2])
    assert len(sampler) == 3 * len(parts) == len(list(sampler))


def test_repeated_steps_prefetch_only_their_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is a group; the source has a cache, whose prefetches are recorded."""
    source, prefetched = dataclasses.replace(numbered([4] * 30), cache=object()), list[int]()
    monkeypatch.setattr(Source, "prefetch", lambda self, shard: prefetched.append(shard))
    blocks, plan = [BlockConfig("photos", 8)], SamplePlan(source, 1, 1, seed=3)
    shape = StepShape(32, 4, micro_batches(blocks, [4], 0, 1))
    for same, most in ((True, 3), (False, 30)):
        prefetched.clear()
        sampler = StepSampler(blocks, {"photos": plan}, lambda step: shape, range(12), same)
        steps = [refs[0] + refs[1] for refs in zip(*[iter(list(sampler))] * 2, strict=True)]
        slots = [frozenset((ref.shard, ref.slot) for ref in refs) for refs in steps]
        assert (len(set(slots)) == 1) == same
        assert {ref.shard for refs in steps for ref in refs} <= set(prefetched)
        assert len(prefetched) <= most and (same or len(set(prefetched)) > 20)
