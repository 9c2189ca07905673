from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.sampling import SamplePlan, default_lanes, micro_batches
from data_pipelines.shards import ShardIndex, Source
from xray.config import BlockConfig
from xray.errors import ConfigError


def source(counts: list[int]) -> Source:
    shards = tuple(
        ShardIndex(
            Path(f"{s:05d}.tar"),
            np.array([f"{s}-{i}" for i in range(n)]),
            ("jpg",),
            np.zeros((n, 1), np.int64),
            np.zeros((n, 1), np.int64),
        )
        for s, n in enumerate(counts)
    )
    return Source("photos", "image", shards, tuple(np.arange(n) for n in counts))


COUNTS = [7, 13, 1, 20, 9]


@pytest.mark.parametrize(("samples", "lanes"), [(8, 8), (10, 4), (3, 2), (64, 64), (7, 1)])
def test_every_slot_once_per_epoch(samples: int, lanes: int) -> None:
    plan = SamplePlan(source(COUNTS), lanes, 2, seed=3)
    total = sum(COUNTS)
    epochs = 6
    steps = epochs * total // samples
    positions = np.concatenate([plan.positions(k, samples) for k in range(steps)])
    assert len(set(positions.tolist())) == len(positions)  # none twice
    per_lane_spread = 2 * total  # lanes run ahead of each other by less than two rounds
    assert positions.max() < steps * samples + per_lane_spread
    # whole early epochs are seen exactly once
    seen = Counter(plan.locate(int(p)) for p in positions if p // total < epochs - 3)
    whole = [p // total for p in positions]
    for epoch in range(epochs - 3):
        assert whole.count(epoch) == total
    assert set(seen.values()) == {epochs - 3}


def test_step_is_a_pure_function_and_shuffles_every_epoch() -> None:
    plan, again = (SamplePlan(source(COUNTS), 4, 2, seed=3) for _ in range(2))
    again.positions(100, 10)
    assert np.array_equal(plan.positions(5, 10), again.positions(5, 10))
    total = sum(COUNTS)
    first = [plan.locate(p) for p in range(total)]
    second = [plan.locate(p) for p in range(total, 2 * total)]
    assert first != second and sorted(first) == sorted(second)
    other = SamplePlan(source(COUNTS), 4, 2, seed=4)
    assert first != [other.locate(p) for p in range(total)]


def test_shuffle_stays_within_groups_of_shards() -> None:
    plan = SamplePlan(source([10] * 6), 1, 2, seed=0)
    for group in range(3):
        shards = {plan.locate(p)[0] for p in range(20 * group, 20 * group + 20)}
        assert len(shards) == 2


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_share_out_the_block(world: int) -> None:
    blocks = [BlockConfig("photos", 12), BlockConfig("clips", 24)]
    cut = [micro_batches(blocks, 1 if world < 6 else 0, rank, world) for rank in range(world)]
    for number, block in enumerate(blocks):
        taken = [
            i for rank in cut for m in rank if m.block == number for i in range(m.start, m.stop)
        ]
        assert taken == list(range(block.samples))
    for rank in cut:  # the engine divides by the number of micro-batches
        assert sum(m.scale for m in rank) / len(rank) == pytest.approx(1)


def test_blocks_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="do not divide over 5 processes: use 10 or 15"):
        micro_batches([BlockConfig("photos", 12)], 0, 0, 5)
    with pytest.raises(ConfigError, match=r"train.micro_batch=5 does not divide"):
        micro_batches([BlockConfig("photos", 12)], 5, 0, 1)


def test_default_lanes() -> None:
    assert [default_lanes(n) for n in (1, 2, 3, 96, 256, 10_000)] == [1, 2, 2, 64, 256, 256]
