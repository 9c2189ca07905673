"""Table d of `bench_data.py`: reads through the real stream of samples that are partly broken.

2 % of the photos and clips cannot be decoded; some clips hang the decode process, or make it
allocate without end. What was replaced is compared, cause by cause, with a walk over the plan.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil

from data_pipelines.decode import transforms
from data_pipelines.decode.sandbox import ClipDecoder
from data_pipelines.shards.source import Sample, open_source
from data_pipelines.stream.loader import Fields, Loaded, iterate_steps
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
LOOKS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the reads: when memory is looked at
# A decode process of its own, since no real clip is known to do either; the number finds it again.
FAULTY = f"""
import time
from data_pipelines import decode_process as process
whole, held = process.open_clip, []
def faulty(data, run={os.getpid()}):
    while data.startswith(b"hang"):
        time.sleep(1)
    while data.startswith(b"memory"):
        held.append(bytearray(b"x") * (1 << 24))
        time.sleep(0.002)
    return whole(data)
process.open_clip = faulty
process.main()
"""


def _photos() -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(1000):
        data = jpeg_of(moving_picture(number, (96, 72), 1)[0])
        kind = "broken" if number % 50 == 17 else "whole"
        yield f"{number:04d}-{kind}", {"jpg": data[: len(data) // 2] if kind == "broken" else data}


def _clips() -> Iterator[tuple[str, dict[str, bytes]]]:
    odd = {**{number: "broken" for number in range(17, 300, 50)}, 40: "hang", 180: "hang"}
    odd[250] = "memory"
    for number in range(300):
        kind = odd.get(number, "whole")
        whole = clip_of(moving_picture(number, (96, 64), 16), (96, 64))
        yield f"{number:04d}-{kind}", {"mp4": whole if kind == "whole" else kind.encode() * 200}


@functools.lru_cache(maxsize=2)
def _decoder(pid: int, seconds: float, gigabytes: float) -> ClipDecoder:
    return ClipDecoder(seconds, gigabytes, (sys.executable, "-c", FAULTY))


def injected(plans: dict[str, SamplePlan], sampler: StepSampler) -> Counter[str]:
    """What must be replaced, by cause: each worker knows what it had to kill itself."""
    causes: Counter[str] = Counter()
    avoided: list[set[tuple[str, int, int]]] = [set() for _ in range(WORKERS)]
    for number, refs in enumerate(sampler):
        mine = avoided[number % WORKERS]  # micro-batches are dealt out in turn
        for ref in refs:
            plan = plans[ref.source]
            for attempt in range(ATTEMPTS):
                shard, slot = plan.candidate(ref.position, attempt)
                member = plan.source.member(shard, slot)
                kind = plan.source.index(shard).key(member).rpartition("-")[2]
                if (ref.source, shard, member) in mine:
                    causes["in quarantine"] += 1
                elif kind == "whole":
                    break
                else:
                    causes[CAUSES[plan.source.modality][kind]] += 1
                if kind in KILLED:
                    mine.add((ref.source, shard, member))
    return causes


def _running() -> tuple[list[psutil.Process], list[psutil.Process]]:
    """(workers, decode processes) of this process; a worker is its fork, with its command line."""
    workers, decoders, own = [], [], psutil.Process().cmdline()
    for process in psutil.process_iter(["cmdline", "ppid"]):
        command = process.info["cmdline"] or []
        if FAULTY in command:
            decoders.append(process)
        elif process.info["ppid"] == os.getpid() and command == own:
            workers.append(process)
    return workers, decoders


def _memory() -> str:
    """MB of each worker, and of each decode process."""
    return "; ".join(
        " + ".join(f"{process.memory_info().rss / 1e6:.0f}" for process in processes)
        for processes in _running()
    )


def _left_behind(patience: float = 5.0) -> int:
    """Workers and decode processes that are still there after a while."""
    deadline = time.monotonic() + patience
    while any(left := _running()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return sum(map(len, left))


def soak(reads: int) -> list[Table]:
    """(d)"""
    data = DataConfig(resolution=64, frames=4, decode_seconds=10.0, decode_gb=0.6)
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
        plans = make_plans(BLOCKS, sources, data, seed=0)
        shape = StepShape(64, 4, micro_batches(BLOCKS, [24, 8], 0, 1))
        sampler = StepSampler(BLOCKS, plans, lambda step: shape, steps)
        wanted = injected(plans, sampler)
        decoder = lambda seconds, gigabytes: _decoder(os.getpid(), seconds, gigabytes)  # noqa: E731
        with patch.object(transforms, "clip_decoder", decoder):
            stream = iterate_steps(sampler, transform, stack_rows, 0, WORKERS, pin=False)
            done, found, memory, seconds = _consume(stream, len(steps))
            rows = [["reads", f"{done:,}", f"{len(steps) * 64:,}"]]
        rows += [[c, f"{found[c]:,}", f"{wanted[c]:,}"] for c in sorted({*found, *wanted})]
        for share, found_then in zip(LOOKS, memory, strict=True):
            rows.append([f"MB of workers; decoders, at {share:.0%}", found_then, "flat"])
        rows += [["processes left behind", str(_left_behind()), "0"]]
        rows += [["seconds", f"{seconds:.0f}", ""]]
    title = f"(d) Reads with {WORKERS} workers; what was replaced, by cause"
    return [Table(title, ["measure", "found", "expected"], rows)]


def _consume(
    stream: Iterator[list[Loaded]], steps: int
) -> tuple[int, Counter[str], list[str], float]:
    """(samples, what was replaced, memory at some points, seconds) of a whole stream."""
    done, found, memory, start = 0, Counter[str](), [], time.perf_counter()
    looks = [round(share * steps) for share in LOOKS]
    for number, loaded in enumerate(stream, start=1):
        done += sum(len(item.batch["pixels"]) for item in loaded)
        found.update(bad.cause for item in loaded for bad in item.bad)
        if number in looks:
            memory.append(_memory())
    return done, found, memory, time.perf_counter() - start
