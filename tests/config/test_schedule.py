"""Values that change during a stage, such as the resolution, and the stream of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import settings, train

from data_pipelines.ingest.user_data import open_sources
from data_pipelines.stream.sampling import StepSampler, StepShape, make_plans, micro_batches
from xray.config.schedule import check, largest, value_at
from xray.errors import ConfigError
from xray.training.metrics import read_metrics

STEPS = [[0.0, 96], [0.6, 160], [0.9, 224]]


def test_the_value_is_that_of_the_last_step_reached() -> None:
    assert [value_at(STEPS, p) for p in (0.0, 0.59, 0.6, 0.89, 0.9, 1.0)] == [
        96, 96, 160, 160, 224, 224,
    ]  # fmt: skip
    assert value_at(64, 0.3) == largest(64) == 64 and largest([[0.0, 9], [0.5, 3]]) == 9


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("96", "must be a whole number or"),
        ([], "must be a whole number or"),
        ([[0.0]], r"\[0.0\] is not \[progress, value\]"),
        ([[0.0, 9.5]], "is no"),
        ([[0.1, 9]], "must rise from 0.0"),
        ([[0.0, 9], [0.5, 8], [0.4, 7]], "must rise from 0.0"),
        ([[0.0, 9], [1.0, 8]], "stay below 1.0"),
        ([[0.0, 0]], "0 must be at least 1"),
    ],
)
def test_invalid_schedules_are_refused(schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(schedule, "data.resolution")


def test_the_samples_do_not_depend_on_the_schedule(demo: Path, tmp_path: Path) -> None:
    config = settings("mae", demo, tmp_path)
    sources = open_sources(config.data, ["photos", "clips"])
    plans = make_plans(config.blocks, sources, config.data, 0)

    def refs(sizes: list[tuple[int, int, int]]) -> list[list[Any]]:
        def shape(step: int) -> StepShape:
            resolution, frames, micro = sizes[step]
            return StepShape(resolution, frames, micro_batches(config.blocks, [micro, micro], 0, 1))

        sampler = StepSampler(config.blocks, plans, shape, range(2))
        batches = list(sampler)
        assert len(sampler) == len(batches)
        first = len(shape(0).micro)
        steps = batches[:first], batches[first:]
        return [
            sorted((ref for batch in step for ref in batch), key=lambda r: (r.source, r.position))
            for step in steps
        ]

    plain, changed = refs([(32, 4, 0), (32, 4, 0)]), refs([(16, 2, 0), (32, 4, 2)])
    for a, b in zip(plain, changed, strict=True):
        assert [(r.source, r.shard, r.slot, r.position) for r in a] == [
            (r.source, r.shard, r.slot, r.position) for r in b
        ]
    assert {(r.resolution, r.frames) for r in changed[0]} == {(16, 2)}
    assert {(r.resolution, r.frames) for r in changed[1]} == {(32, 4)}


def test_a_stage_grows_and_its_artifact_has_the_final_size(demo: Path, tmp_path: Path) -> None:
    grown = train(
        "hashtag", demo, tmp_path / "run", "data.resolution=[[0.0,16],[0.5,32]]",
        "data.frames=[[0.0,2],[0.7,4]]", "train.micro_batch=[[0.0,0],[0.5,2]]",
        "data.sources.val={shards: heldout, modality: image}",
        "data.validation=[{source: val, samples: 8}]", "train.validate_every=2",
        "model.keep_rates=[0.9,0.7,0.5]",
    )  # fmt: skip
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["resolution"] for row in rows] == [16] * 3 + [32] * 3
    assert [row["frames"] for row in rows] == [2] * 4 + [4] * 2
    for row in rows[1:5:2]:  # validation uses the current sizes and keep rates
        assert row["val/resolution"] == row["resolution"]
        assert row["val/keep_rate/2"] == row["keep_rate/2"]
    assert grown.manifest["metrics"]["val/keep_rate/2"] == 0.5
    assert rows[-1]["keep_rate/2"] == 0.5 and grown.manifest["keep_rate"] == [0.9, 0.7, 0.5]
    # The grid of the largest size, 32 px.
    assert grown.load("backbone")["pos_embed"].shape == (
        1,
        17,
        32,
    )


def test_each_size_must_be_a_multiple_of_the_patch_size(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"20 pixels \(data.resolution\) are not"):
        train("mae", demo, tmp_path, "data.resolution=[[0.0,20],[0.5,32]]")
    with pytest.raises(ConfigError, match=r"train.micro_batch=3 does not divide"):
        train("mae", demo, tmp_path, "train.micro_batch=[[0.0,0],[0.5,3]]")
