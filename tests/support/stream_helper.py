"""Runs a data stream as a training run does, and writes the samples of every step to a file.

usage: stream_helper.py DATA OUT STEPS WORKERS KILL, once per rank, with RANK and WORLD_SIZE set.
It resumes from OUT/start, a copy of OUT/state, which holds the next step and the quarantine. The
process kills itself after step KILL; -1 = never.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Sample, open_source
from data_pipelines.stream import quarantine
from data_pipelines.stream.loader import iterate_steps
from data_pipelines.stream.quarantine import Entry
from data_pipelines.stream.sampling import StepSampler, StepShape, make_plans, micro_batches
from xray import dist
from xray.config import BlockConfig, DataConfig, SourceConfig

RANK, WORLD = dist.rank(), dist.world_size()
BLOCKS = [BlockConfig("photos", 12), BlockConfig("clips", 6)]


def settings(root: str) -> DataConfig:
    """Make the data config of the demo data."""
    sources = {
        "photos": SourceConfig("photos", "image"),
        "clips": SourceConfig("clips", "video"),
    }
    return DataConfig(
        sources=sources,
        blocks=BLOCKS,
        root=root,
        shuffle_shards=2,
        color_jitter=[0.4, 0.4, 0.4, 0.1],
        erase=0.3,
        decode_seconds=3600,
    )


def main(root: str, out: Path, steps: int, workers: int, kill: int) -> None:
    """Run the stream of this rank and append one line per step to OUT/rankN.jsonl."""
    data = settings(root)
    sources = {
        name: open_source(name, source.shards, source.modality, root)
        for name, source in data.sources.items()
    }
    plans = make_plans(BLOCKS, sources, data, seed=7)
    state, start = out / "state", out / "start"
    first = int((start / "step").read_text()) if start.is_dir() else 0
    entries = quarantine.load(start / "quarantine.jsonl")
    quarantine.exclude(entries, plans)

    def transform(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
        pixels = load_pixels(sample, data, rng)
        digest = hashlib.sha256(sample.key.encode() + pixels.numpy().tobytes()).digest()
        return {"digest": torch.frombuffer(bytearray(digest), dtype=torch.uint8)}

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"digest": torch.stack([row["digest"] for row in rows])}

    shape = StepShape(24, 4, micro_batches(BLOCKS, [2, 1], RANK, WORLD))
    sampler = StepSampler(BLOCKS, plans, lambda step: shape, range(first, steps))
    stream = iterate_steps(sampler, transform, collate, 7, workers, pin=False)  # type: ignore[arg-type]
    for step, loaded in enumerate(stream, start=first):
        rows = []
        for micro, item in zip(shape.micro, loaded, strict=True):
            for index, digest in zip(
                range(micro.start, micro.stop), item.batch["digest"].tolist(), strict=True
            ):
                rows.append([micro.source, index, bytes(digest).hex()])
            entries += [Entry(b.source, b.shard, b.key, b.cause) for b in item.bad if b.quarantine]
        with (out / f"rank{RANK}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "rows": rows}) + "\n")
        if kill == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if RANK == 0 and step % 3 == 2:  # the part of a checkpoint about data
            state.mkdir(exist_ok=True)
            (state / "step").write_text(str(step + 1))
            quarantine.save(entries, state / "quarantine.jsonl")


if __name__ == "__main__":
    root, out, steps, workers, kill = sys.argv[1:6]
    main(root, Path(out), int(steps), int(workers), int(kill))
