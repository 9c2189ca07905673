"""Table c of `bench_data.py`: the sample plan at a million shards.

The simulated source has 1e6 shards and 1e9 samples, 4,096 ranks, blocks of 32,768 and 4,096 lanes.
The table shows the time of a rank's batch, memory and opening time of the manifest, and checks that
all ranks get samples and no sample comes twice. On a smaller source, which is read completely, it
checks that every slot is read exactly once per epoch.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

from data_pipelines.shards.columns import open_columns
from data_pipelines.shards.manifest import Manifest, open_manifest
from data_pipelines.shards.source import Source
from data_pipelines.stream.sampling import SamplePlan, micro_batches
from tools.common.manifests import GROUP, uneven, write_manifest
from tools.common.tables import Table
from xray.config import BlockConfig

SHARDS, SAMPLES = 10**6, 10**9
RANKS, BLOCK, LANES = 4096, 32_768, 4096


def open_plan(path: Path, lanes: int) -> SamplePlan:
    """Open the sample plan of a manifest whose shards do not exist."""
    source = Source("photos", "image", "image", Manifest("nowhere", *open_columns(path)))
    return SamplePlan(source, lanes, GROUP, seed=0)


def scale(path: Path) -> list[list[str]]:
    """Measure opening, memory and the time of a rank's batch; call it in a fresh process."""
    before, start = _resident(), time.perf_counter()
    plan = open_plan(path, LANES)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    plan.locate(np.array([0]))
    first = time.perf_counter() - start
    growth = (_resident() - before) / 1e6
    rng, share, seconds = np.random.default_rng(1), BLOCK // RANKS, []
    last = SAMPLES // BLOCK - 1  # number of steps that start in the first epoch
    for number in range(1010):
        step, rank = int(rng.integers(last)), int(rng.integers(RANKS))
        start = time.perf_counter()
        plan.locate(plan.positions(step, BLOCK, rank * share, (rank + 1) * share))
        if number >= 10:
            seconds.append(1e3 * (time.perf_counter() - start))
    size = path.stat().st_size / 1e6
    tail = float(np.percentile(seconds, 99))
    return [
        ["open the manifest and plan", f"{opened * 1e3:.1f} ms ({size:.0f} MB mapped)", ""],
        ["first permutation of an epoch", f"{first * 1e3:.0f} ms", ""],
        ["resident memory after both", f"{growth:.0f} MB", "< 300 MB"],
        ["a rank's batch, median of 1,000", f"{np.median(seconds):.2f} ms", "< 5 ms"],
        [
            "a rank's batch, 99th percentile / maximum",
            f"{tail:.2f} / {max(seconds):.2f} ms",
            "< 5 ms",
        ],
    ]


def _resident() -> int:
    return psutil.Process().memory_info().rss


def shares(world: int, block: int) -> list[tuple[int, int]]:
    """Return the part of a block, (start, stop), of each rank."""
    parts = [
        micro_batches([BlockConfig("photos", block)], [0], rank, world) for rank in range(world)
    ]
    return [(part[0].start, part[-1].stop) for part in parts]


def no_duplicates(path: Path) -> list[list[str]]:
    """Count samples per rank, and duplicate samples in steps spread over the first epoch."""
    sizes = Counter(stop - start for start, stop in shares(RANKS, BLOCK))
    plan = open_plan(path, LANES)
    spread = np.random.default_rng(2).choice(SAMPLES // BLOCK - 101, 100, replace=False)
    steps = np.unique([*range(100), *spread.tolist()])
    positions = np.concatenate([plan.positions(int(step), BLOCK) for step in steps])
    inside = positions[positions < plan.total]
    shard, slot = plan.locate(inside)
    duplicates = len(positions) - len(np.unique(positions))
    duplicates += len(inside) - len(np.unique(shard << 32 | slot))
    cells = " and ".join(f"{ranks:,} ranks of {size}" for size, ranks in sizes.items())
    measure = f"duplicate samples, in {len(positions):,} samples of {len(steps)} steps"
    return [
        ["samples per rank and step", cells, f"{RANKS:,} ranks of {BLOCK // RANKS}"],
        [measure, f"{duplicates}", "0"],
    ]


def exactly_once(folder: Path) -> list[list[str]]:
    """Count the slots of 997 uneven shards that 64 ranks read exactly once in each epoch."""
    counts = np.random.default_rng(3).integers(1, 400, 997)
    path = folder / "small.manifest"
    write_manifest(path, [f"{i}.tar" for i in range(997)], np.zeros(997, np.int64), counts)
    plan, epochs = open_plan(path, 256), 3
    ends, total = np.cumsum(counts), int(counts.sum())
    reads = np.zeros((epochs + 3, total), np.int64)  # a lane is ahead by less than two epochs
    for step in range((epochs + 1) * total // 4096 + 1):
        for start, stop in shares(64, 4096):
            positions = plan.positions(step, 4096, start, stop)
            shard, slot = plan.locate(positions)
            np.add.at(reads, (positions // total, ends[shard] - counts[shard] + slot), 1)
    once = int((reads[:epochs] == 1).sum())
    measure = f"slots read exactly once per epoch, 997 shards, 64 ranks, {epochs} epochs"
    return [[measure, f"{once:,}", f"{epochs * total:,}"]]


def verify_files(folder: Path, files: int) -> list[list[str]]:
    """Time opening a manifest without and with a check of its (empty) files' sizes and times."""
    shards = folder / "files"
    shards.mkdir()
    names = [f"{number:07d}.tar" for number in range(files)]
    for name in names:
        (shards / name).touch()
    mtimes = np.array([(shards / name).stat().st_mtime_ns for name in names])
    write_manifest(shards / "shards.manifest", names, mtimes, np.ones(files))
    seconds = []
    for known in (open_manifest(str(shards)).state, ""):
        start = time.perf_counter()
        assert len(open_manifest(str(shards), known=known)) == files
        seconds.append(time.perf_counter() - start)
    measure = f"open a manifest, {files:,} files: unchecked / checked"
    return [[measure, f"{seconds[0] * 1e3:.1f} ms / {seconds[1]:.2f} s", ""]]


def plan_at_scale(files: int) -> list[Table]:
    """Make table (c); files: number of real files to check, 0 for none."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), []
        path, pool = folder / "large.manifest", ProcessPoolExecutor(1, get_context("spawn"))
        names = (f"{number // 1000:04d}/{number % 1000:05d}.tar" for number in range(SHARDS))
        times = np.zeros(SHARDS, np.int64)
        write_manifest(path, list(names), times, uneven(SHARDS, SAMPLES))
        with pool:
            rows += pool.submit(scale, path).result()
        rows += no_duplicates(path) + exactly_once(folder)
        rows += verify_files(folder, files) if files else []
    title = f"(c) The sample plan: {SHARDS:,} shards, {SAMPLES:,} samples, {RANKS:,} ranks, "
    return [Table(f"{title}blocks of {BLOCK:,}", ["measure", "measured", "target"], rows)]
