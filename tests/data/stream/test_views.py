"""Several views of a decoded sample: the same for any cut of a step, and decoded once."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import clip
from shards import numbered, photo, write_tar
from tiny import settings, train
from torch import Tensor

from data_pipelines.decode import transforms
from data_pipelines.shards.source import Sample, Source, open_source
from data_pipelines.stream import sampling
from data_pipelines.stream.loader import iterate_steps
from data_pipelines.stream.sampling import SamplePlan, StepSampler, StepShape, micro_batches
from stages import stage_class
from xray.config import BlockConfig, DataConfig
from xray.errors import ConfigError
from xray.training.step_data import check_batches

DATA = DataConfig(crop_scale=[0.4, 1.0])


def read(
    source: Source,
    steps: range,
    views: int,
    micro: int,
    workers: int = 0,
    data: DataConfig = DATA,
    size: int = 16,
) -> list[Tensor]:
    """Read steps of 12 samples; return pixels [12, T, 3, size, size] of each step."""

    def transform(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
        return {"pixels": transforms.load_pixels(sample, data, rng)}

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"pixels": torch.stack([row["pixels"] for row in rows])}

    blocks = [BlockConfig("s", 12)]
    shape = StepShape(size, 2, micro_batches(blocks, [micro], 0, 1))
    plans = {"s": SamplePlan(source, 2, 2, seed=0)}
    sampler = StepSampler(blocks, plans, lambda step: shape, steps, views=views)
    stream = iterate_steps(sampler, transform, collate, 5, workers, pin=False)  # type: ignore[arg-type]
    return [torch.cat([item.batch["pixels"] for item in step]) for step in stream]


@pytest.fixture
def photos(tmp_path: Path) -> Source:
    """40 photos."""
    write_tar(tmp_path / "photos.tar", {f"{i:03d}.jpg": photo(i) for i in range(40)})
    return open_source("s", str(tmp_path / "photos.tar"), "image")


@pytest.fixture
def films(tmp_path: Path) -> Source:
    """8 clips."""
    write_tar(tmp_path / "clips.tar", {f"{i:03d}.mp4": clip(48, 4 + i) for i in range(8)})
    return open_source("s", str(tmp_path / "clips.tar"), "video")


@pytest.mark.parametrize("world", [1, 2, 4])  # 4 ranks have 3 samples each: a half sample more
def test_each_sample_is_read_once_per_epoch_for_any_world(world: int) -> None:
    plan = SamplePlan(numbered([7, 13, 1, 20, 9]), 4, 2, seed=3)
    block = BlockConfig("photos", 12)
    steps: list[list[tuple[int, int]]] = [[] for _ in range(25)]
    for rank in range(world):
        shape = StepShape(32, 1, micro_batches([block], [0], rank, world))
        sampler = StepSampler([block], {"photos": plan}, lambda _, s=shape: s, range(25), views=2)  # type: ignore[misc]
        for step, refs in enumerate(sampler):
            steps[step] += [(ref.position, ref.view) for ref in refs]
    for number, step in enumerate(steps):
        distinct = plan.positions(number, 6).tolist()
        assert step == [(position, view) for position in distinct for view in (1, 2)]
    epoch = Counter(position for step in steps for position, _ in step if position < 50)
    assert set(epoch.values()) == {2} and len(epoch) == 50


@pytest.mark.parametrize("kind", ["photos", "films"])
def test_views_are_a_function_of_the_step(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts that separate the views of a sample, workers and a later start change nothing."""
    source: Source = request.getfixturevalue(kind)
    whole = read(source, range(4), 3, 12)
    for micro, part, workers in ((4, 64, 0), (2, 1, 0), (6, 2, 2)):
        monkeypatch.setattr(sampling, "PART", part)
        cut = read(source, range(2, 4), 3, micro, workers)
        assert all(torch.equal(a, b) for a, b in zip(whole[2:], cut, strict=True))
    rows = whole[0].flatten(1).unique(dim=0)
    assert len(rows) == 12  # all views differ


def test_a_sample_is_decoded_once(photos: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    honest = transforms._decode

    def count(media: bytes, *args: object) -> Tensor:
        decoded.append(len(media))
        return honest(media, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(transforms, "_decode", count)
    for views, times in ((1, 12), (3, 4)):
        decoded.clear()
        read(photos, range(1), views, 12)
        assert len(decoded) == times


def test_a_view_is_the_crop_that_its_random_numbers_give(photos: Source) -> None:
    """Photos are decoded in full, alone and for several views."""
    (pixels,) = read(photos, range(1), 2, 12, size=40)
    plan = SamplePlan(photos, 2, 2, seed=0)
    positions = plan.positions(0, 6)
    places = zip(positions.tolist(), *plan.locate(positions), strict=True)
    for number, (position, shard, slot) in enumerate(places):
        sample = photos.sample(shard, photos.member(shard, slot), 40, 2)
        for view in (1, 2):
            rng = np.random.default_rng([5, zlib.crc32(b"s"), position, 0, view])
            alone = transforms.load_pixels(sample, DATA, rng)
            assert torch.equal(alone, pixels[2 * number + view - 1])


def test_views_of_a_clip_have_the_same_frames(films: Source) -> None:
    """A crop of the whole frame, without a flip, shows which frames these are."""
    data = DataConfig(crop_scale=[1.0, 1.0], flip=False)
    (pixels,) = read(films, range(1), 3, 12, data=data)
    views = pixels.unflatten(0, (4, 3))
    assert (views == views[:, :1]).all()
    assert len(pixels.flatten(1).unique(dim=0)) == 4


def test_views_are_refused_where_they_make_no_sense(demo: Path, tmp_path: Path) -> None:
    config = settings("clip", demo, tmp_path, "data.views=2")
    with pytest.raises(ConfigError, match=r"data.views=2: stage clip compares.*set data.views to"):
        check_batches(stage_class("clip")(config), config)
    with pytest.raises(ConfigError, match=r"8 samples of 'photos' do not.*data.views=3: use 6 or"):
        settings("mae", demo, tmp_path, "data.views=3")
    with pytest.raises(ConfigError, match=r"data.views=0 must be at least 1"):
        settings("mae", demo, tmp_path, "data.views=0")


def test_views_are_part_of_the_run(demo: Path, tmp_path: Path) -> None:
    """A run without the setting, of an earlier version, has one view."""
    artifact = train("mae", demo, tmp_path / "two", "data.views=2", "train.samples=24")
    assert artifact.manifest["metrics"]["photos/epochs"] == pytest.approx(2 * 4 / 96)
    with pytest.raises(ConfigError, match=r"config.data.views: 2 -> 1"):
        train("mae", demo, tmp_path / "two", "train.samples=24")
    train("mae", demo, tmp_path / "one", "train.samples=24")
    path = tmp_path / "one" / "run.json"
    record = json.loads(path.read_text())
    assert "views" not in record["config"]["data"]
    with pytest.raises(ConfigError, match=r"config.data.views: 1 -> 2"):
        train("mae", demo, tmp_path / "one", "train.samples=24", "data.views=2")
