"""The stream from shards to batches: the same after kills and with other numbers of processes."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import hostile_decoder
import numpy as np
import psutil
import pytest
import stream_helper
import torch
from clips import clip
from shards import jpeg, photo, progressive, write_tar
from torch import Tensor

from data_pipelines.decode import image_limits, transforms
from data_pipelines.shards.manifest import write_manifest
from data_pipelines.shards.remote import ShardCache
from data_pipelines.shards.source import Sample, open_source
from data_pipelines.stream import quarantine, sampling
from data_pipelines.stream.loaded import Loaded
from data_pipelines.stream.loader import iterate_steps
from data_pipelines.stream.quarantine import Entry
from data_pipelines.stream.sampling import SamplePlan, StepSampler, StepShape, micro_batches
from data_pipelines.text.captions import choose_captions, read_captions
from xray.config import BlockConfig, DataConfig
from xray.errors import DataError

STEPS = 12
Steps = dict[int, dict[tuple[str, int], str]]


def start(root: Path, out: Path, world: int, workers: int, kill: int = -1) -> list[int]:
    """Run all ranks until they end; return their exit codes."""
    out.mkdir(exist_ok=True)
    if (out / "state").is_dir():  # a copy, so that a late rank does not read the next state
        shutil.copytree(out / "state", out / "start", dirs_exist_ok=True)
    args = [str(root), str(out), str(STEPS), str(workers), str(kill)]
    group = [
        subprocess.Popen(
            [sys.executable, stream_helper.__file__, *args],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)},
        )
        for rank in range(world)
    ]
    return [process.wait() for process in group]


def read(out: Path) -> Steps:
    """Return step -> (source, index in the block) -> digest of key and pixels.

    If a step was run again after a kill, both runs must have equal digests.
    """
    steps: Steps = {}
    for path in sorted(out.glob("rank*.jsonl"), key=lambda p: p.stat().st_mtime):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            digests = steps.setdefault(row["step"], {})
            for source, index, digest in row["rows"]:
                assert digests.setdefault((source, index), digest) == digest
    return steps


def test_killed_and_resumed_with_other_ranks_and_workers(demo: Path, tmp_path: Path) -> None:
    """Runs 2 ranks x 2 workers, then 1 x 0, both killed, then 2 x 1, and compares every step."""
    assert start(demo, tmp_path / "whole", world=1, workers=1) == [0]
    whole = read(tmp_path / "whole")
    assert sorted(whole) == list(range(STEPS)) and all(len(rows) == 18 for rows in whole.values())
    out = tmp_path / "killed"
    assert start(demo, out, world=2, workers=2, kill=4) == [-signal.SIGKILL] * 2
    assert (out / "state" / "step").read_text() == "3"
    assert start(demo, out, world=1, workers=0, kill=7) == [-signal.SIGKILL]
    assert (out / "state" / "step").read_text() == "6"
    assert start(demo, out, world=2, workers=1) == [0, 0]
    assert read(out) == whole
    keys = [digest for rows in whole.values() for digest in rows.values()]
    assert len(set(keys)) == len(keys)  # a repeated sample has another augmentation


def load_keys(plan: SamplePlan, data: DataConfig, steps: range, workers: int) -> list[Loaded]:
    """Load a source in batches of 4 that hold the key of each sample as a number."""

    def transform(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
        transforms.load_pixels(sample, data, rng)
        return {"key": torch.tensor(int(sample.key))}

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"key": torch.stack([row["key"] for row in rows])}

    block = BlockConfig("s", 4)
    shape = StepShape(16, 2, micro_batches([block], [0], 0, 1))
    sampler = StepSampler([block], {"s": plan}, lambda step: shape, steps)
    stream = iterate_steps(sampler, transform, collate, 1, workers, pin=False)  # type: ignore[arg-type]
    return [loaded for (loaded,) in stream]


def test_broken_images_have_the_same_replacements_for_any_workers(tmp_path: Path) -> None:
    whole = {f"{i:03d}.jpg": photo(i) for i in range(40)}
    broken = {**whole, "007.jpg": jpeg()[:150], "021.jpg": b"", "033.jpg": b"<html>"}
    for shard in range(4):
        part = sorted(broken)[shard * 10 : shard * 10 + 10]
        write_tar(tmp_path / f"{shard}.tar", {name: broken[name] for name in part})
    source = open_source("s", str(tmp_path), "image")
    runs = []
    for workers in (0, 2):
        plan = SamplePlan(source, 2, 2, seed=0)
        runs.append(load_keys(plan, DataConfig(), range(20), workers))
    streams = [[item.batch["key"].tolist() for item in run] for run in runs]
    assert streams[0] == streams[1]
    flat = [key for batch in streams[0] for key in batch]
    assert not {7, 21, 33} & set(flat)
    bad = [entry for item in runs[0] for entry in item.bad]
    # two epochs; 033 is also drawn once as a replacement
    count = Counter(entry.key for entry in bad)
    assert count == {"007": 2, "021": 2, "033": 3}
    assert {entry.cause for entry in bad} == {"undecodable image"}
    assert not any(entry.quarantine for entry in bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_would_take_minutes_are_named_and_replaced(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program (EPS), a JPEG of a thousand scans, and fill bytes that Pillow skips one by one."""
    good = photo(0)
    files = {f"{i:03d}.jpg": photo(i) for i in range(12)}
    files["003.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n"
    files["006.jpg"] = progressive((2000, 2000), 1000)
    files["009.jpg"] = good[:2] + b"\xff" * 4_000_000 + good[2:]
    write_tar(tmp_path / "0.tar", files)
    monkeypatch.setattr(image_limits, "SECONDS", 0.05)
    plan = SamplePlan(open_source("s", str(tmp_path), "image"), 1, 1, seed=0)
    loaded = load_keys(plan, DataConfig(), range(3), workers)
    assert not {3, 6, 9} & {key for item in loaded for key in item.batch["key"].tolist()}
    assert {(b.key, b.cause, b.quarantine) for item in loaded for b in item.bad} >= {
        ("003", "undecodable image", False),
        ("006", "image too large", False),
        ("009", "image decode timed out", True),
    }


def test_a_clip_whose_decode_process_was_killed_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = {f"{i:03d}.mp4": clip(128, 4) for i in range(8)}
    clips["005.mp4"] = hostile_decoder.killed_once(tmp_path / "killed", clips["005.mp4"])
    write_tar(tmp_path / "0.tar", clips)
    decoder = hostile_decoder.Decoder(2.0)
    monkeypatch.setattr(transforms, "clip_decoder", lambda data: decoder)
    plan = SamplePlan(open_source("s", str(tmp_path), "video"), 1, 1, seed=0)
    loaded = load_keys(plan, DataConfig(), range(2), 0)
    decoder.close()
    assert (tmp_path / "killed").exists()
    assert not [entry for item in loaded for entry in item.bad]
    assert sorted(k for item in loaded for k in item.batch["key"].tolist()) == list(range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_join_to_the_batches_of_whole_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Samples are of different lengths, padded with -1; two of them are broken."""
    files = {f"{i:03d}.jpg": photo(i) for i in range(40)}
    write_tar(tmp_path / "0.tar", {**files, "007.jpg": jpeg()[:150], "021.jpg": b""})
    source, data = open_source("s", str(tmp_path), "image"), DataConfig()

    def transform(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
        length = 1 + int(sample.key) % 7
        return {
            "pixels": transforms.load_pixels(sample, data, rng),
            "ids": torch.full((length,), int(sample.key)),
        }

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([row["ids"] for row in rows], True, -1)
        return {"pixels": torch.stack([row["pixels"] for row in rows]), "ids": ids}

    def read(part: int) -> list[Loaded]:
        monkeypatch.setattr(sampling, "PART", part)
        blocks = [BlockConfig("s", 20)]
        shape = StepShape(16, 2, micro_batches(blocks, [10], 0, 1))
        plans = {"s": SamplePlan(source, 2, 2, seed=0)}
        sampler = StepSampler(blocks, plans, lambda step: shape, range(6))
        stream = iterate_steps(sampler, transform, collate, 1, workers, pin=False)  # type: ignore[arg-type]
        return [item for step in stream for item in step]

    whole, parts = read(10), read(3)
    assert len(whole) == 12
    lengths = set()
    for one, other in zip(whole, parts, strict=True):
        assert one.batch.keys() == other.batch.keys()
        assert all(torch.equal(value, other.batch[key]) for key, value in one.batch.items())
        assert one.bad == other.bad
        assert one.reading["image"][0] == other.reading["image"][0]
        lengths.add(one.batch["ids"].shape[1])
    assert {entry.key for item in parts for entry in item.bad} == {"007", "021"}
    assert 7 in lengths


def nine_photos(folder: Path, samples: int, steps: int) -> StepSampler:
    """Write a shard of nine photos, and return a sampler of steps of one block over them."""
    write_tar(folder / "0.tar", {f"{i}.jpg": photo(i) for i in range(9)})
    plan = SamplePlan(open_source("s", str(folder), "image"), 1, 1, seed=0)
    block = BlockConfig("s", samples)
    shape = StepShape(16, 1, micro_batches([block], [0], 0, 1))
    return StepSampler([block], {"s": plan}, lambda step: shape, range(steps))


def test_no_more_than_a_step_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are read ahead wait in shared memory."""
    monkeypatch.setattr(sampling, "PART", 4)
    sampler = nine_photos(tmp_path, samples=64, steps=100)
    drawn: list[int] = []
    honest = StepSampler._refs

    def counted(self: StepSampler, *args: object) -> list[sampling.SampleRef]:
        refs = honest(self, *args)  # type: ignore[arg-type]
        drawn.append(len(refs))
        return refs

    monkeypatch.setattr(StepSampler, "_refs", counted)
    stream = iterate_steps(
        sampler,
        lambda *_: {"x": torch.zeros(1)},
        lambda rows: {"x": torch.stack([row["x"] for row in rows])},
        *(1, 2, False),
    )
    (loaded,) = next(stream)
    stream.close()
    assert loaded.batch["x"].shape == (64, 1)
    assert sum(drawn) == 2 * 64 and max(drawn) == 4


def test_a_part_that_cannot_be_read_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "PART", 4)
    sampler = nine_photos(tmp_path, samples=8, steps=1)
    plan = sampler.plans["s"]
    last = plan.positions(0, 8)[-1]

    def transform(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
        if (sample.shard, sample.member) == tuple(x[0] for x in plan.locate(np.array([last]))):
            raise DataError("the disk is gone")
        return {"x": torch.zeros(1)}

    stream = iterate_steps(sampler, transform, lambda rows: dict(rows[0]), 1, 0, pin=False)
    with pytest.raises(DataError, match="the disk is gone"):
        next(stream)


def test_a_source_without_usable_samples_ends_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {f"{i}.jpg": b"junk" for i in range(9)})
    plan = SamplePlan(open_source("s", str(tmp_path), "image"), 1, 1, seed=0)
    with pytest.raises(DataError, match=r"20 samples in a row cannot be used.*0.tar"):
        load_keys(plan, DataConfig(), range(2), 0)


def test_a_killed_worker_raises_a_data_error(tmp_path: Path) -> None:
    """The system kills workers if memory runs out; broken images may crash a decoder."""
    sampler = nine_photos(tmp_path, samples=1, steps=100)

    def deadly(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    stream = iterate_steps(sampler, deadly, lambda rows: {}, 1, workers=1, pin=False)
    with pytest.raises(DataError, match="a loader process ended at step 1"):
        next(stream)


def test_a_failed_run_does_not_wait_for_its_workers(tmp_path: Path) -> None:
    """Workers ignore SIGTERM; a worker that is busy must not keep the run from exiting."""
    sampler = nine_photos(tmp_path, samples=1, steps=100)

    def slow(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
        if (tmp_path / "first").exists():
            time.sleep(10_000)
        (tmp_path / "first").touch()
        return {"x": torch.zeros(1)}

    earlier = {child.pid for child in psutil.Process().children()}
    stream = iterate_steps(sampler, slow, lambda rows: dict(rows[0]), 1, workers=1, pin=False)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert {c.pid for c in psutil.Process().children() if c.status() != "zombie"} <= earlier


def test_closing_a_stream_early_raises_no_error(tmp_path: Path) -> None:
    sampler = nine_photos(tmp_path, samples=2, steps=100)
    unraised: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, unraised.append
    try:
        for _ in range(3):
            stream = iterate_steps(
                sampler, lambda *_: {"x": torch.zeros(1)}, lambda r: dict(r[0]), 1, 2, pin=False
            )
            next(stream)
            stream.close()  # type: ignore[attr-defined]
            del stream
            gc.collect()
    finally:
        sys.unraisablehook = hook
    assert unraised == []


def test_hostile_json_is_a_bad_sample(tmp_path: Path) -> None:
    """The JSON breaks parsers or arithmetic, or a caption cannot be encoded as UTF-8."""
    odd = [
        b"[" * 100_000,
        b'{"captions": [{"text": "a", "weight": Infinity}, "b"]}',
        b'{"captions": [{"text": "a", "weight": 1' + b"0" * 400 + b'}, "b"]}',
        b'{"caption": 5}',
    ]
    files: dict[str, bytes] = {}
    for number in range(12):
        good = b'{"captions": ["fine", "also \\ud800 fine"]}'
        files[f"{number:03d}.jpg"] = photo(number)
        files[f"{number:03d}.json"] = odd[number] if number < len(odd) else good
    write_tar(tmp_path / "0.tar", files)
    plan = SamplePlan(open_source("s", str(tmp_path), "image"), 1, 1, seed=0)
    block = BlockConfig("s", 4)
    shape = StepShape(16, 1, micro_batches([block], [0], 0, 1))
    sampler = StepSampler([block], {"s": plan}, lambda step: shape, range(9))

    def transform(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
        text = choose_captions(read_captions(sample.files), rng)[0].text
        return {"length": torch.tensor(len(text.encode()))}

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"length": torch.stack([row["length"] for row in rows])}

    stream = iterate_steps(sampler, transform, collate, 1, 0, pin=False)  # type: ignore[arg-type]
    bad = [entry for (item,) in stream for entry in item.bad]
    assert {entry.key for entry in bad} == {"000", "001", "002", "003"}
    assert {entry.cause for entry in bad} == {"broken json", "broken caption"}


def test_a_hanging_clip_stays_in_quarantine_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run that knows the clip from its checkpoint reads the same samples."""
    clips = {f"{i:03d}.mp4": clip(48, 4) for i in range(12)}
    clips["005.mp4"] = hostile_decoder.HANG + b"." * 50
    write_tar(tmp_path / "0.tar", clips)
    source = open_source("s", str(tmp_path), "video")
    decoder = hostile_decoder.Decoder(2.0)
    monkeypatch.setattr(transforms, "clip_decoder", lambda data: decoder)
    plan = SamplePlan(source, 1, 1, seed=0)
    first = load_keys(plan, DataConfig(), range(6), 0)
    bad = [entry for item in first for entry in item.bad]
    assert [(b.key, b.cause, b.quarantine) for b in bad] == [
        ("005", "video decode timed out", True),
        ("005", "in quarantine", False),
    ]
    entries = [Entry(b.source, b.shard, b.key, b.cause) for b in bad if b.quarantine]
    quarantine.save(entries, tmp_path / "quarantine.jsonl")
    assert quarantine.load(tmp_path / "quarantine.jsonl") == entries

    resumed = SamplePlan(source, 1, 1, seed=0)
    unknown = Entry("s", "0.tar", "no such key", ""), Entry("other", "0.tar", "005", "")
    quarantine.exclude([*entries, *unknown], {"s": resumed})
    again = load_keys(resumed, DataConfig(), range(6), 0)
    assert [i.batch["key"].tolist() for i in again] == [i.batch["key"].tolist() for i in first]
    assert [e.cause for item in again for e in item.bad] == ["in quarantine"] * 2
    decoder.close()
    assert not [c for c in psutil.Process().children() if "hostile" in " ".join(c.cmdline())]


def test_a_remote_stream_equals_the_local_one_and_is_prefetched(
    server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    url, folder, seen = server
    for shard in range(6):
        files = {f"{shard}{i}.jpg": photo(10 * shard + i) for i in range(8)}
        write_tar(folder / f"{shard}.tar", files)
    write_manifest(str(folder), checksum=True)
    cache = ShardCache(tmp_path / "cache", 10**9, 600)
    local = SamplePlan(open_source("s", str(folder), "image"), 2, 2, seed=0)
    expected = [i.batch["key"].tolist() for i in load_keys(local, DataConfig(), range(24), 0)]
    for workers in (0, 2):
        remote = SamplePlan(open_source("s", f"{url}/", "image", cache=cache), 2, 2, seed=0)
        loaded = load_keys(remote, DataConfig(), range(24), workers)
        assert [item.batch["key"].tolist() for item in loaded] == expected
    tars = [line for line in seen if line.endswith(".tar")]
    assert sorted(tars) == [f"GET /{shard}.tar" for shard in range(6)]  # each tar once
    readings = [item.reading for item in loaded]
    assert sum(reading["hit"][0] for reading in readings) == 96

    empty = ShardCache(tmp_path / "other", 10**9, 600)
    plan = SamplePlan(open_source("s", f"{url}/", "image", cache=empty), 2, 2, seed=0)
    block = BlockConfig("s", 4)
    shape = StepShape(16, 2, micro_batches([block], [0], 0, 1))
    next(iter(StepSampler([block], {"s": plan}, lambda step: shape, range(1))))
    wanted = plan.shards_ahead(plan.positions(0, 4)).tolist()
    assert len(wanted) > 1
    while len(list((tmp_path / "other").glob("*.tar"))) < len(wanted):
        time.sleep(0.1)  # no sample was read, so these are prefetches
