"""Measured peak memory of training steps against the estimate of `xray plan`.

    python -m tools.benchmarks.bench_memory [--only NAME] [--device cuda] [--json FILE]

Engine and Accumulator run three steps with random weights and images; the third is measured. On a
CPU, the memory is the sum of allocations that torch.profiler reports (profile_memory). On CUDA, it
is torch.cuda.max_memory_allocated. The measurement on a CPU does not include the batch, which is
therefore subtracted from the estimate.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tools.common.tables import Table, print_tables
from tools.common.timing import hardware

BASE: dict[str, Any] = {
    "model": {
        "name": "vit_small_patch16_224",
        "kwargs": {"embed_dim": 192, "depth": 6, "num_heads": 3},
        "keep_rate_span": [0.0, 0.0],
    },
    "data": {
        "resolution": 112,
        "frames": 8,
        "sources": {
            "photos": {"shards": "photos", "modality": "image"},
            "clips": {"shards": "clips", "modality": "video"},
        },
        "blocks": [{"source": "photos", "samples": 16}, {"source": "clips", "samples": 8}],
    },
    "train": {"precision": "fp32", "samples": 1000},
    "optim": {"warmup": 0.0},
}
WHOLE = "model.kwargs={embed_dim: 384, depth: 12, num_heads: 6}"  # ViT-S/16
TEXT = ("text.max_length=32", "clip.adapter_blocks=1", "clip.embed_dim=128")
# name -> (stage, settings)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "MAE, images and clips": ("mae", ()),
    "MAE, bf16": ("mae", ("train.precision=bf16",)),
    "hashtag, 1,000 tags": ("hashtag", ()),
    "hashtag, 50,000 tags in chunks": ("hashtag", ("hashtag.chunk=4096",)),
    "hashtag, growing EViT, ToMe": ("hashtag", ("model.reduce=tome", "train.micro_batch=4")),
    "hashtag, ViT-S, checkpointing": ("hashtag", ("model.grad_checkpointing=true", WHOLE)),
    "clip, whole block": ("clip", TEXT),
    "clip, gradient cache of 4": ("clip", (*TEXT, "train.micro_batch=4", "train.precision=bf16")),
    "clip, sigmoid loss, AdamW": (
        "clip",
        (*TEXT, "clip.loss=sigmoid", "optim.name=adamw", "train.micro_batch=8"),
    ),
    "text, LoRA": (
        "text",
        ("text.max_length=64", "data.blocks=[{source: photos, samples: 32}]"),
    ),
    "MAE, ZeRO 1": ("mae", ("zero=1",)),
    "MAE, ZeRO 2, micro-batches": ("mae", ("zero=2", "train.micro_batch=4")),
    "MAE, ZeRO 3": ("mae", ("zero=3",)),
    "MAE, bf16, ZeRO 1": ("mae", ("train.precision=bf16", "zero.stage=1")),
    "MAE, bf16, ZeRO 2, micro-batches": (
        "mae",
        ("train.precision=bf16", "zero.stage=2", "train.micro_batch=4"),
    ),
    "MAE, bf16, ZeRO 3": ("mae", ("train.precision=bf16", "zero.stage=3")),
}
LLM = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
}
STEPS, PROGRESS = 3, 0.9


def compare(
    stage: str, settings: tuple[str, ...], device: str = "cpu", base: Any = None
) -> dict[str, Any]:
    """Measure and estimate one configuration.

    Returns bytes ("measured", "planned", and "buckets": ZeRO's communication buckets) and "flops".
    base: settings below `settings`; None for BASE.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from stages import stage_class
    from stages.base import Facts
    from xray import dist
    from xray.config import loading as cfg
    from xray.optim import reduce_bucket
    from xray.planning.estimate import memory_of
    from xray.planning.fake_step import rehearse, size_of

    config: Any = cfg.load_config(
        stage_class(stage).Config, stage, base or BASE, cfg.parse_overrides(settings)
    )
    config.validate()
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLM), "utf-8")
        facts = Facts(50_000 if config.stage == "hashtag" and config.hashtag.chunk else 1000,
                      Path(folder))  # fmt: skip
        size, rehearsal = size_of(config, facts), rehearse(config, facts, PROGRESS)
        planned = memory_of(config, size, rehearsal, dist.world_size())
        measured = measure(config, facts, torch.device(device))
    buckets = 4 * reduce_bucket(config.zero, size.trained) if config.zero.stage else 0
    batch = planned.batch if device == "cpu" else 0
    return {
        "measured": measured,
        "planned": planned.total - batch,
        "buckets": min(buckets, planned.buffers),
        "flops": rehearsal.flops,
    }


def measure(config: Any, facts: Any, device: torch.device) -> int:
    """Run training steps and return the peak memory of the last one, in bytes."""
    from data_pipelines.stream.loaded import Loaded
    from xray.planning.fake_step import planned
    from xray.planning.memory_tracker import materialize
    from xray.training.accumulation import Accumulator
    from xray.training.deepspeed_setup import init_distributed
    from xray.training.engine import Engine
    from xray.training.step_data import step_shape

    init_distributed(device)
    stage, module = planned(config, facts)
    shape = step_shape(stage, config.blocks, PROGRESS)
    loaded = []
    for micro in shape.micro:
        clip = config.data.sources[micro.source].modality == "video"
        size = micro.stop - micro.start, shape.frames if clip else 1, shape.resolution
        batch = stage.example_batch(module, *size, micro.source)
        for name in set(batch) & {"pixels", "mask_noise"}:
            dtype = batch[name].dtype
            values = torch.rand(batch[name].shape)
            batch[name] = (255 * values).to(dtype) if dtype == torch.uint8 else values
        loaded.append(Loaded(batch))

    def steps() -> None:
        materialize(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.02)
            for buffer in module.buffers():
                buffer.fill_(1)
        engine = Engine(module.to(device), config)
        accumulator = Accumulator(engine, stage, device, 0)
        for step in range(STEPS):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with record_function(f"step {step}"):
                accumulator.train(step, PROGRESS, shape.micro, loaded)
                engine.set_lr(1e-4, PROGRESS)
                engine.step()
            assert engine.grad_norm < float("inf"), "the optimizer skipped the step"
        engine.destroy()

    gc.collect()  # otherwise objects of the previous configuration are freed during the measurement
    if device.type == "cuda":
        steps()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps()
    return _peak(profiler, f"step {STEPS - 1}")


def _peak(profiler: Any, span_name: str) -> int:
    """Return the peak of allocated bytes within a recorded span."""
    events = profiler.profiler.kineto_results.events()
    span = next(e for e in events if e.name() == span_name)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    allocated = peak = 0
    for time, change in changes:
        allocated += change
        if span.start_ns() <= time <= span.end_ns():
            peak = max(peak, allocated)
    return peak


def table(device: str, only: str) -> Table:
    """Make the table of all configurations whose name contains `only`."""
    rows = []
    for name, (stage, settings) in RUNS.items():
        if only and only not in name:
            continue
        result = compare(stage, settings, device)
        measured, planned, buckets = (result[k] / 1e6 for k in ("measured", "planned", "buckets"))
        error = planned / measured - 1
        error_without = (planned - buckets) / (measured - buckets) - 1
        rows.append(
            [
                name,
                f"{measured:,.1f}",
                f"{planned:,.1f}",
                f"{error:+.1%}",
                f"{buckets:,.0f}",
                f"{error_without:+.1%}",
            ]
        )
        print(rows[-1], flush=True)
    heads = ["step", "measured MB", "planned MB", "error", "buckets MB", "error without buckets"]
    return Table("Peak memory of a step, measured and planned", heads, rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="", help="measure only names that contain this")
    parser.add_argument("--json", type=Path, help="also write the table to this JSON file")
    options = parser.parse_args()
    print_tables([table(options.device, options.only)], hardware(options.device), options.json)


if __name__ == "__main__":
    main()
