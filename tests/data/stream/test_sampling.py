"""The plan: exact, elastic, shuffled, and small."""

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
    turned,
    within_budget,
)
from data_pipelines.stream.shuffle import keys_of, permuted
from xray.config import BlockConfig
from xray.errors import ConfigError

COUNTS = [7, 13, 1, 20, 9]
Place = tuple[int, int]


def places(plan: SamplePlan, positions: np.ndarray | range) -> list[Place]:
    shards, slots = plan.locate(np.asarray(positions))
    return list(zip(shards.tolist(), slots.tolist(), strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 256, 1000, 4097])
def test_the_shuffle_is_a_bijection(n: int) -> None:
    for key in keys_of([5], np.arange(3)):
        result = permuted(np.arange(n), np.full(n, n), np.full(n, key))
        assert sorted(result.tolist()) == list(range(n))


def test_the_shuffle_is_uniform() -> None:
    """Where 0 goes, and how far apart 0 and 1 end, over many keys: chi-square at 99.9 %."""
    n, trials = 20, 40_000
    keys, sizes = keys_of([1], np.arange(trials)), np.full(trials, n)
    first = permuted(np.zeros(trials, np.int64), sizes, keys)
    second = permuted(np.ones(trials, np.int64), sizes, keys)
    for values, bins in ((first, n), ((second - first) % n - 1, n - 1)):
        counts = np.bincount(values, minlength=bins)
        expected = trials / bins
        chi = ((counts - expected) ** 2 / expected).sum()
        assert chi < 46, (bins, chi)  # 99.9 % of chi-square with 19 degrees of freedom is 43.8


@pytest.mark.parametrize(("samples", "lanes"), [(8, 8), (10, 4), (3, 2), (64, 64), (7, 1)])
def test_every_slot_once_per_epoch(samples: int, lanes: int) -> None:
    plan = SamplePlan(numbered(COUNTS), lanes, 2, seed=3)
    total = sum(COUNTS)
    epochs = 6
    steps = epochs * total // samples
    positions = np.concatenate([plan.positions(k, samples) for k in range(steps)])
    assert len(set(positions.tolist())) == len(positions)  # none twice
    per_lane_spread = 2 * total  # lanes run ahead of each other by less than two rounds
    assert positions.max() < steps * samples + per_lane_spread
    early = positions[positions // total < epochs - 3]
    assert np.bincount(early // total).tolist() == [total] * (epochs - 3)
    assert set(Counter(places(plan, early)).values()) == {epochs - 3}


def test_step_is_a_pure_function_and_shuffles_every_epoch() -> None:
    plan, again = (SamplePlan(numbered(COUNTS), 4, 2, seed=3) for _ in range(2))
    again.locate(again.positions(100, 10))
    assert np.array_equal(plan.positions(5, 10), again.positions(5, 10))
    assert places(plan, plan.positions(5, 10)) == places(again, again.positions(5, 10))
    total = sum(COUNTS)
    first, second = places(plan, range(total)), places(plan, range(total, 2 * total))
    assert first != second and sorted(first) == sorted(second)
    other = SamplePlan(numbered(COUNTS), 4, 2, seed=4)
    assert first != places(other, range(total))


def test_shuffle_stays_within_groups_of_shards() -> None:
    plan = SamplePlan(numbered([10] * 6), 1, 2, seed=0)
    for group in range(3):
        shards = {shard for shard, _ in places(plan, range(20 * group, 20 * group + 20))}
        assert len(shards) == 2


def test_stand_ins_are_fixed_and_near_at_first() -> None:
    plan = SamplePlan(numbered([10] * 6), 1, 2, seed=0)
    near = {shard for shard, _ in places(plan, range(20, 40))}
    found = [plan.candidate(25, attempt) for attempt in range(20)]
    assert found[0] == places(plan, [25])[0]
    assert {shard for shard, _ in found[1:11]} <= near
    assert not {shard for shard, _ in found[11:]} <= near
    assert found == [plan.candidate(25, attempt) for attempt in range(20)]
    assert len(set(found)) > 10


def refs(plan: SamplePlan, block: BlockConfig, steps: range, world: int) -> list[list[Place]]:
    """What all ranks together read of each step."""
    result: list[list[Place]] = [[] for _ in steps]
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
    assert refs(plan, block, range(9), world) == refs(plan, block, range(9), 1)
    assert refs(plan, block, range(4, 9), world) == refs(plan, block, range(9), 1)[4:]


def test_a_rank_touches_few_shards() -> None:
    """Locality: lanes/world + 2 lanes, each within one group of shards."""
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


def test_the_next_shards_of_a_lane_are_known_ahead() -> None:
    plan = SamplePlan(numbered([10] * 12), 1, 2, seed=0)
    for place, groups in ((0, 1), (9, 1), (10, 2), (19, 2)):
        here = {shard for shard, _ in places(plan, range(20 * groups))}
        assert set(plan.shards_ahead(np.array([place])).tolist()) == here


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_share_out_the_block(world: int) -> None:
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


def test_blocks_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="do not divide over 5 processes: use 10 or 15"):
        micro_batches([BlockConfig("photos", 12)], [0], 0, 5)
    with pytest.raises(ConfigError, match=r"train.micro_batch=5 does not divide"):
        micro_batches([BlockConfig("photos", 12)], [5], 0, 1)


def test_a_token_budget_sets_the_forward_of_each_modality() -> None:
    images, clips = BlockConfig("photos", 96), BlockConfig("clips", 24)
    assert within_budget(images, 2, tokens=196, budget=196 * 16) == 16
    assert within_budget(clips, 2, tokens=784, budget=196 * 16) == 4  # the same tokens
    assert within_budget(clips, 2, tokens=784, budget=5 * 784) == 4  # 5 does not divide 12
    assert within_budget(clips, 1, tokens=784, budget=10**9) == 24
    assert within_budget(clips, 1, tokens=784, budget=1) == 1


def test_default_lanes() -> None:
    assert [default_lanes(n) for n in (1, 2, 3, 96, 256, 10_000)] == [1, 2, 2, 64, 256, 256]


def test_workers_get_every_modality() -> None:
    """Two micro-batches per step and two workers: neither worker has only the clips."""
    for count, workers in ((2, 2), (4, 2), (3, 3), (4, 4), (1, 2)):
        flat = [number for step in range(60) for number in turned(count, step)]
        assert [sorted(flat[i : i + count]) for i in range(0, len(flat), count)] == [
            list(range(count))
        ] * 60
        for worker in range(workers):
            assert set(flat[worker::workers]) == set(range(count))


def test_steps_of_the_same_samples_fetch_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is a group of its own; a cache is there, and is asked for what comes."""
    source, asked = dataclasses.replace(numbered([4] * 30), cache=object()), list[int]()
    monkeypatch.setattr(Source, "prefetch", lambda self, shard: asked.append(shard))
    blocks, plan = [BlockConfig("photos", 8)], SamplePlan(source, 1, 1, seed=3)
    shape = StepShape(32, 4, micro_batches(blocks, [4], 0, 1))
    for same, most in ((True, 3), (False, 30)):
        asked.clear()
        sampler = StepSampler(blocks, {"photos": plan}, lambda step: shape, range(12), same)
        steps = [refs[0] + refs[1] for refs in zip(*[iter(list(sampler))] * 2, strict=True)]
        own = [{(ref.shard, ref.slot) for ref in refs} for refs in steps]
        assert (len({frozenset(step) for step in own}) == 1) == same
        assert {ref.shard for refs in steps for ref in refs} <= set(asked)
        assert len(asked) <= most and (same or len(set(asked)) > 20)
