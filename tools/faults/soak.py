"""Soak test of the data stream with broken samples; table d of `bench_data.py`, too.

2 % of the photos and clips cannot be decoded. Some clips hang the decode process or make it
allocate memory without end. The replaced samples are compared, by cause, with the number that is
expected from the sample plan.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil

from data_pipelines.decode import transforms
from data_pipelines.decode.sandbox import ClipDecoder
from data_pipelines.shards.source import Sample, open_source
from data_pipelines.stream.loaded import Fields, Loaded
from data_pipelines.stream.loader import iterate_steps
from data_pipelines.stream.sampling import (
    ATTEMPTS,
    SamplePlan,
    StepSampler,
    StepShape,
    make_plans,
    micro_batches,
)
from tools.common.media import clip_of, jpeg_of, moving_picture, stack_rows, write_shards
from tools.common.tables import Table
from tools.faults.commands import Outcome
from xray.config import BlockConfig, DataConfig

CAUSES = {
    "image": {"broken": "undecodable image"},
    "video": {
        "broken": "undecodable video",
        "hang": "video decode timed out",
        "memory": "video decode took too much memory",
    },
}
KILLED = ("hang", "memory")
BLOCKS = [BlockConfig("photos", 48), BlockConfig("clips", 16)]
WORKERS = 2
READS = 2_000  # of one attempt
MEMORY_AT = (0.2, 0.4, 0.6, 0.8, 1.0)  # shares of the reads after which memory is measured
# Decode process whose decoder fails on marked clips, because no real clip is known to hang it or to
# exhaust its memory. The process id in the source identifies this run's decode processes.
FAULTY = f"""
import time
from data_pipelines.decode import worker
open_clip, allocated = worker.open_clip, []
def faulty(data, run={os.getpid()}):
    while data.startswith(b"hang"):
        time.sleep(1)
    while data.startswith(b"memory"):
        allocated.append(bytearray(b"x") * (1 << 24))
        time.sleep(0.002)
    return open_clip(data)
worker.open_clip = faulty
worker.main()
"""


def _photos() -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(1000):
        data = jpeg_of(moving_picture(number, (96, 72), 1)[0])
        kind = "broken" if number % 50 == 17 else "good"
        yield f"{number:04d}-{kind}", {"jpg": data[: len(data) // 2] if kind == "broken" else data}


def _clips() -> Iterator[tuple[str, dict[str, bytes]]]:
    faults = {**{number: "broken" for number in range(17, 300, 50)}, 40: "hang", 180: "hang"}
    faults[250] = "memory"
    for number in range(300):
        kind = faults.get(number, "good")
        clip = clip_of(moving_picture(number, (96, 64), 16), (96, 64))
        yield f"{number:04d}-{kind}", {"mp4": clip if kind == "good" else kind.encode() * 200}


@functools.lru_cache(maxsize=2)
def _decoder(pid: int, seconds: float, gigabytes: float) -> ClipDecoder:
    return ClipDecoder(seconds, gigabytes, (sys.executable, "-c", FAULTY))


def expected_replacements(plans: dict[str, SamplePlan], sampler: StepSampler) -> Counter[str]:
    """Count the samples that must be replaced, by cause.

    Each worker keeps its own quarantine of samples for which it killed the decode process.
    """
    causes: Counter[str] = Counter()
    quarantines: list[set[tuple[str, int, int]]] = [set() for _ in range(WORKERS)]
    for number, refs in enumerate(sampler):
        quarantine = quarantines[number % WORKERS]  # workers take micro-batches in turn
        for ref in refs:
            plan = plans[ref.source]
            for attempt in range(ATTEMPTS):
                shard, slot = plan.candidate(ref.position, attempt)
                member = plan.source.member(shard, slot)
                kind = plan.source.index(shard).key(member).rpartition("-")[2]
                if (ref.source, shard, member) in quarantine:
                    causes["in quarantine"] += 1
                elif kind == "good":
                    break
                else:
                    causes[CAUSES[plan.source.modality][kind]] += 1
                if kind in KILLED:
                    quarantine.add((ref.source, shard, member))
    return causes


def _running() -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Return this run's (workers, decode processes).

    A worker is a fork of this process, so it has the same command line.
    """
    workers, decoders, own_command = [], [], psutil.Process().cmdline()
    for process in psutil.process_iter(["cmdline", "ppid"]):
        command = process.info["cmdline"] or []
        if FAULTY in command:
            decoders.append(process)
        elif process.info["ppid"] == os.getpid() and command == own_command:
            workers.append(process)
    return workers, decoders


def _memory() -> str:
    """Format the memory of each worker and of each decode process, in MB."""
    return "; ".join(
        " + ".join(f"{process.memory_info().rss / 1e6:.0f}" for process in processes)
        for processes in _running()
    )


def _left_behind(timeout: float = 5.0) -> int:
    """Wait for workers and decode processes to end and count those still running after timeout."""
    deadline = time.monotonic() + timeout
    while any(running := _running()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return sum(map(len, running))


def soak(folder: Path, data: Path, rng: random.Random) -> Outcome:
    """Read broken samples among others, each reported by its cause, with no process left behind."""
    measured = measure(READS, rng.randrange(1 << 30), seconds=3.0)
    faults = [f"{measured.left} processes left"] if measured.left else []
    found, expected = _by_kind(measured.replaced), _by_kind(measured.expected)
    if found != expected or measured.reads[0] != measured.reads[1]:
        faults.append(f"{measured.reads} reads, {found}, not {expected}")
    kind = "stream of broken samples"
    return Outcome(kind, "; ".join(faults), measured.expected.total())


def _by_kind(causes: Counter[str]) -> dict[str, int]:
    """Count broken files by cause, and all others together: a busy machine changes their causes."""
    broken = {cause: n for cause, n in causes.items() if cause.startswith("undecodable")}
    return {**broken, "others": causes.total() - sum(broken.values())}


def soak_table(reads: int) -> Table:
    """Make the table of a long soak test."""
    start = time.perf_counter()
    got = measure(reads, 0, seconds=10.0)
    rows = [["reads", *(f"{count:,}" for count in got.reads)]]
    causes = sorted({*got.replaced, *got.expected})
    rows += [[cause, f"{got.replaced[cause]:,}", f"{got.expected[cause]:,}"] for cause in causes]
    for share, text in zip(MEMORY_AT, got.memory, strict=True):
        rows.append([f"memory of workers; decoders, MB, at {share:.0%}", text, "flat"])
    rows += [["processes left behind", str(got.left), "0"]]
    rows += [["seconds", f"{time.perf_counter() - start:.0f}", ""]]
    title = f"(d) Soak test with {WORKERS} workers; replaced samples, by cause"
    return Table(title, ["measure", "measured", "expected"], rows)


@dataclass(frozen=True)
class Measured:
    """Result of a soak test: reads done and asked for, replaced samples by cause, and the rest."""

    reads: tuple[int, int]
    replaced: Counter[str]
    expected: Counter[str]
    memory: list[str]  # at MEMORY_AT
    left: int  # processes


def measure(reads: int, seed: int, seconds: float) -> Measured:
    """Read a stream of broken samples; seconds: limit for one clip."""
    data = DataConfig(resolution=64, frames=4, decode_seconds=seconds, decode_gb=0.6)
    steps = range(max(5, reads // sum(block.samples for block in BLOCKS)))

    def transform(sample: Sample, rng: np.random.Generator | None) -> Fields:
        return {"pixels": transforms.load_pixels(sample, data, rng)}

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder / "photos", _photos(), 125)
        write_shards(folder / "clips", _clips(), 50)
        sources = {
            "photos": open_source("photos", str(folder / "photos"), "image"),
            "clips": open_source("clips", str(folder / "clips"), "video"),
        }
        plans = make_plans(BLOCKS, sources, data, seed=seed)
        shape = StepShape(64, 4, micro_batches(BLOCKS, [24, 8], 0, 1))
        sampler = StepSampler(BLOCKS, plans, lambda step: shape, steps)
        expected = expected_replacements(plans, sampler)
        decoder = lambda own: _decoder(os.getpid(), own.decode_seconds, own.decode_gb)  # noqa: E731
        with patch.object(transforms, "clip_decoder", decoder):
            stream = iterate_steps(sampler, transform, stack_rows, 0, WORKERS, pin=False)
            done, replaced, memory = _consume(stream, len(steps))
        return Measured((done, 64 * len(steps)), replaced, expected, memory, _left_behind())


def _consume(stream: Iterator[list[Loaded]], steps: int) -> tuple[int, Counter[str], list[str]]:
    """Read a whole stream; return (samples, replaced samples by cause, memory)."""
    done, replaced, memory = 0, Counter[str](), list[str]()
    memory_steps = [round(share * steps) for share in MEMORY_AT]
    for number, loaded in enumerate(stream, start=1):
        done += sum(len(item.batch["pixels"]) for item in loaded)
        replaced.update(bad.cause for item in loaded for bad in item.bad)
        if number in memory_steps:
            memory.append(_memory())
    return done, replaced, memory
