"""Estimated needs of training with 25 billion samples on 1,024 GPUs, as shown in docs/scale.md.

    python -m xray plan vit_h14_1024 --devices 1024 text.llm=FOLDER --json > plan.json
    python -m tools.benchmarks.simulate_scale plan.json [--folder DISK] [--json FILE]

No model is trained. The estimates use the numbers of `xray plan`. The sample plan is the real one
over a manifest without files. The speed of saving is measured on this disk with the checkpoint of
a small model. Failures are simulated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.columns import open_columns
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.source import Source
from data_pipelines.stream.sampling import SamplePlan
from tools.common.manifests import GROUP, uneven, write_manifest
from tools.common.tables import Table, print_tables
from tools.common.timing import hardware

SAMPLES, PER_SHARD = 25 * 10**9, 10_000
DEVICES, PER_NODE, BLOCK, LANES = 1024, 8, 65_536, 1024
IMAGE_SHARE = 7 / 8  # share of images in a block, as in the recipe
IMAGE_BYTES, CLIP_BYTES = 50e3, 1e6
# Llama 3 (2407.21783, table 5): 419 unexpected interruptions in 54 days of 16,384 H100s
GPU_HOURS_PER_FAILURE = 54 * 24 * 16_384 / 419
RESTART_MINUTES = 10.0
STORE = 10e9  # bytes/s that one job can write to the shared file system
LINK = 50e9  # bytes/s of each GPU between nodes: 400 Gb/s
MFU, PEAK = 0.4, 989e12
EMBED = 1280  # width of the joint space


def assumptions() -> Table:
    """Make table (a)."""
    rows = [
        [
            "model FLOPs reached (MFU)",
            f"{MFU:.0%} of {PEAK / 1e12:.0f} TFLOP/s",
            "assumed: no GPU was measured",
        ],
        [
            "an image / a clip in its shard",
            f"{IMAGE_BYTES / 1e3:.0f} KB / {CLIP_BYTES / 1e6:.0f} MB",
            "assumed: 256 px on the short side, about 2 s of video",
        ],
        ["images : clips", "7 : 1", "the recipe's blocks"],
        ["samples per shard", f"{PER_SHARD:,}", "assumed"],
        [
            "GPU hours per failure of a job",
            f"{GPU_HOURS_PER_FAILURE:,.0f}",
            "419 unexpected interruptions in 54 days of 16,384 H100s (Llama 3, 2407.21783)",
        ],
        ["from a failure to training again", f"{RESTART_MINUTES:.0f} min", "assumed"],
        ["file system, for one job", f"{STORE / 1e9:.0f} GB/s", "assumed"],
        ["network of a GPU between nodes", f"{LINK / 1e9:.0f} GB/s", "400 Gb/s, the vendor's"],
    ]
    return Table("(a) Assumptions", ["quantity", "value", "source"], rows)


def stages(plan: dict[str, Any]) -> Table:
    """Make table (b): steps, hours and data rates."""
    rows = []
    sample_bytes = IMAGE_SHARE * IMAGE_BYTES + (1 - IMAGE_SHARE) * CLIP_BYTES
    for row in plan["stages"]:
        step = row["flops_per_step"] / (DEVICES * PEAK * MFU)
        rate = row["samples"] / row["steps"] / step
        data = "" if row["stage"] == "text" else f"{rate * sample_bytes / 1e9:.1f} GB/s"
        rows.append(
            [
                row["stage"],
                f"{row['samples'] / 1e9:.3g} B",
                f"{row['steps']:,}",
                f"{row['flops_per_step'] / 1e15:,.1f} PFLOP",
                f"{step:.2f} s",
                f"{row['steps'] * step / 3600:,.1f} h",
                f"{rate:,.0f}",
                data,
                f"{row['memory']['total'] / 1e9:.1f} GB",
            ]
        )
    heads = [
        "stage",
        "samples",
        "steps",
        "FLOPs per step",
        "time per step",
        "total time",
        "samples/s",
        "read from storage",
        "memory",
    ]
    stored = SAMPLES * sample_bytes / 1e15
    title = f"(b) Stages of the recipe ({SAMPLES / 1e9:.0f} B samples are {stored:.1f} PB)"
    return Table(title, heads, rows)


def sample_plan() -> Table:
    """Make table (c): the real sample plan over a manifest of 25 billion samples."""
    shards, share = SAMPLES // PER_SHARD, BLOCK // DEVICES
    rng, seconds = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.manifest"
        names = [f"{number // 1000:05d}/{number % 1000:03d}.tar" for number in range(shards)]
        write_manifest(path, names, np.zeros(shards, np.int64), uneven(shards, SAMPLES))
        source = Source("photos", "image", "image", Manifest("nowhere", *open_columns(path)))
        plan = SamplePlan(source, LANES, GROUP, seed=0)
        start = time.perf_counter()
        plan.locate(np.array([0]))
        first = time.perf_counter() - start
        last = SAMPLES // BLOCK - 1
        for _ in range(300):
            step, rank = int(rng.integers(last)), int(rng.integers(DEVICES))
            start = time.perf_counter()
            plan.locate(plan.positions(step, BLOCK, rank * share, (rank + 1) * share))
            seconds.append(1e3 * (time.perf_counter() - start))
        drawn = rng.choice(last, 50, replace=False)
        positions = np.concatenate([plan.positions(int(step), BLOCK) for step in drawn])
        shard, slot = plan.locate(positions)
        duplicates = len(positions) - len(np.unique(shard << 32 | slot))
        middle = last // 2
        rank_positions = [plan.positions(middle + n, BLOCK, 0, share) for n in range(20)]
        rank_shards = len(np.unique(plan.locate(np.concatenate(rank_positions))[0]))
        size = path.stat().st_size / 1e6
    rows = [
        ["shards", f"{shards:,}"],
        ["shards per lane and epoch", f"{shards / LANES:,.0f}"],
        ["manifest, memory-mapped, not read", f"{size:,.0f} MB"],
        ["first permutation of an epoch", f"{first:.2f} s"],
        [
            "a rank's batch, median / 99th percentile",
            f"{np.median(seconds):.2f} / {np.percentile(seconds, 99):.2f} ms",
        ],
        [f"duplicate samples, in {len(positions):,} of 50 steps", f"{duplicates}"],
        ["shards that a rank reads from in 20 steps", f"{rank_shards}"],
    ]
    title = f"(c) The sample plan: {SAMPLES:,} samples, {DEVICES:,} ranks, block {BLOCK:,}"
    return Table(title, ["measure", "measured"], rows)


def save_rate(folder: Path) -> float:
    """Measure the bytes/s of writing the state of a ViT-S with AdamW, including fsync."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from stages import stage_class
    from stages.base import Facts
    from tools.benchmarks.bench_memory import BASE
    from xray.config import loading as cfg
    from xray.planning.fake_step import planned
    from xray.planning.memory_tracker import materialize
    from xray.training.deepspeed_setup import init_distributed
    from xray.training.engine import Engine
    from xray.training.portable_state import FOLDER, portable_files, write_files

    init_distributed(torch.device("cpu"))
    config = cfg.load_config(stage_class("mae").Config, "mae", BASE)
    module = planned(config, Facts())[1]
    materialize(module)
    engine = Engine(module, config)
    for name in engine.trained:
        for slot in engine.slots:
            engine.write(name, torch.zeros(module.get_parameter(name).shape), slot)
    rates = []
    for _ in range(3):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            start = time.perf_counter()
            (Path(temporary) / FOLDER).mkdir()
            write_files(portable_files(engine), Path(temporary))
            files = [path for path in Path(temporary).rglob("*") if path.is_file()]
            for path in files:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            rates.append(sum(p.stat().st_size for p in files) / (time.perf_counter() - start))
    return float(np.median(rates))


def checkpoints(plan: dict[str, Any], folder: Path) -> Table:
    """Make table (d): size of checkpoints and time to save them."""
    rate = save_rate(folder)
    rows = []
    for row in plan["stages"]:
        size = row["checkpoint_bytes"]
        rows.append(
            [
                row["stage"],
                f"{row['trained'] / 1e6:,.0f} M",
                f"{size / 1e9:.1f} GB",
                f"{size / rate:,.0f} s",
                f"{size / STORE:.1f} s",
            ]
        )
    heads = [
        "stage",
        "trained parameters",
        "checkpoint",
        f"time at {rate / 1e6:,.0f} MB/s, measured here",
        f"time at {STORE / 1e9:.0f} GB/s, assumed",
    ]
    return Table("(d) Checkpoints", heads, rows)


def hours_with_failures(
    hours: float, save_minutes: float, save_seconds: float, runs: int = 200
) -> float:
    """Simulate a job of `hours` with failures; return its mean wall-clock hours over runs.

    save_minutes: interval between checkpoints; save_seconds: duration of a save.
    """
    mean = GPU_HOURS_PER_FAILURE / DEVICES
    rng, interval, save = np.random.default_rng(0), save_minutes / 60, save_seconds / 3600
    total = 0.0
    for _ in range(runs):
        done = 0.0
        to_failure = rng.exponential(mean)  # hours until the next failure
        while done < hours:
            part = min(interval, hours - done)
            if to_failure >= part + save:
                to_failure -= part + save
                total += part + save
                done += part
            else:  # the work since the last checkpoint is lost
                total += to_failure + RESTART_MINUTES / 60
                to_failure = rng.exponential(mean)
    return total / runs


def failures(plan: dict[str, Any]) -> Table:
    """Make table (e): time lost to failures and saves."""
    flops = sum(row["flops_per_step"] * row["steps"] for row in plan["stages"])
    hours = flops / (DEVICES * PEAK * MFU) / 3600
    largest = max(row["checkpoint_bytes"] for row in plan["stages"])
    mean = GPU_HOURS_PER_FAILURE / DEVICES
    rows = []
    for store in (STORE, STORE / 10):
        save = largest / store
        best = math.sqrt(2 * save / 3600 * mean) * 60  # Young's rule
        for minutes in (5, 15, 30, 60, 240):
            wall = hours_with_failures(hours, minutes, save)
            rows.append(
                [
                    f"{store / 1e9:.0f} GB/s ({save:.0f} s)",
                    f"{minutes} min",
                    f"{wall:,.1f} h",
                    f"{wall - hours:,.1f} h",
                    f"{wall / hours - 1:.1%}",
                    f"{best:.0f} min",
                ]
            )
    title = (
        f"(e) Failures: {hours:,.1f} h of work on {DEVICES:,} GPUs, one failure every "
        f"{mean:.1f} h, {hours / mean:.1f} expected; 200 simulated runs for each row"
    )
    heads = ["save at", "every", "run takes", "lost", "share of the work"]
    return Table(title, [*heads, "optimal interval (Young's rule)"], rows)


def communication(plan: dict[str, Any]) -> Table:
    """Make table (f): bytes that a GPU receives in a step."""
    ring, rows = (DEVICES - 1) / DEVICES, []
    for row in plan["stages"]:
        weights = 4 * row["trained"] * ring
        step = row["flops_per_step"] / (DEVICES * PEAK * MFU)
        gathered = 0.0
        if row["stage"] == "clip":  # image and text features and their gradients, fp32
            gathered = 2 * 2 * 4 * EMBED * BLOCK * ring
        received = 2 * weights + weights + gathered
        rows.append(
            [
                row["stage"],
                f"{2 * weights / 1e9:.2f} GB",
                f"{weights / 1e9:.2f} GB",
                f"{gathered / 1e9:.2f} GB" if gathered else "",
                f"{received / LINK * 1e3:.0f} ms",
                f"{received / LINK / step:.0%}",
            ]
        )
    heads = [
        "stage",
        "gradients, all-reduce",
        "weights, all-gather (ZeRO 1)",
        "features of both sides",
        f"time at {LINK / 1e9:.0f} GB/s",
        "share of the step time",
    ]
    return Table("(f) Bytes that a GPU receives per step, fp32", heads, rows)


def tables(plan: dict[str, Any], folder: Path) -> Iterable[Table]:
    """Make all tables, one after the other."""
    yield assumptions()
    yield stages(plan)
    yield sample_plan()
    yield checkpoints(plan, folder)
    yield failures(plan)
    yield communication(plan)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="output of xray plan --json")
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="folder on the disk to measure"
    )
    parser.add_argument("--json", type=Path, help="also write the tables to this JSON file")
    options = parser.parse_args()
    plan = json.loads(options.plan.read_text("utf-8"))
    if plan["devices"] != DEVICES:
        parser.error(
            f"{options.plan} is a plan for {plan['devices']} devices: run xray plan with "
            f"--devices {DEVICES}"
        )
    print_tables(tables(plan, options.folder), hardware("cpu"), options.json)


if __name__ == "__main__":
    main()
