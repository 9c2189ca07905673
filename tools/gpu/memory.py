"""Estimates of `xray plan` against the measured memory and FLOPs of training steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.benchmarks.bench_memory import BASE, RUNS, compare
from tools.gpu.findings import Check, Finding, Note, Scale
from tools.gpu.stage_steps import BLOCKS, PROGRESS, TOY, StageSteps, toy_settings
from xray.config.loading import merge
from xray.planning.memory_tracker import FLOPS

ERROR = 0.15  # largest relative error of the estimated memory
FLOP_ERROR = 0.02
LEAST = 6.0  # seconds that must remain for another case
# Runs of bench_memory with toy models, and the same kinds of runs with ViT-B/16.
TOYS = ("clip, gradient cache of 4",)
B16 = {
    "model": {"name": "vit_base_patch16_224"},
    "data": {
        "resolution": 224,
        "frames": 16,
        "blocks": [{"source": "photos", "samples": 128}, {"source": "clips", "samples": 8}],
    },
    "train": {"precision": "bf16", "samples": 10000},
}
TEXT = ("text.max_length=64", "clip.adapter_blocks=2", "clip.embed_dim=512")
REAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "MAE": ("mae", ()),
    "clip, whole block": ("clip", (*TEXT, "model.keep_rate=0.7")),
    "clip, gradient cache": ("clip", (*TEXT, "train.micro_batch=8")),
    "hashtag, checkpointing": ("hashtag", ("model.grad_checkpointing=true", "hashtag.chunk=8192")),
    "MAE, ZeRO 2, micro-batches": ("mae", ("zero=2", "train.micro_batch=8")),
    "MAE, ZeRO 3": ("mae", ("zero=3",)),
}


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Compare the estimated peak memory with the measured one, and FLOPs with a count."""
    base = merge(TOY, {"data": {"blocks": BLOCKS}}) if scale.toy else merge(BASE, B16)
    runs = {name: RUNS[name] for name in TOYS} if scale.toy else REAL
    yield from _flops(device)
    for name, (stage, settings) in runs.items():
        if scale.left() < LEAST:
            yield Note(f"{name}: no time left")
            continue
        result = compare(stage, settings, device.type, base)
        # ZeRO's buckets have a fixed size, which would hide the rest of a toy.
        measured, planned = (result[key] - result["buckets"] for key in ("measured", "planned"))
        error = planned / measured - 1
        found = f"{error:+.1%}: {planned / 1e6:,.0f} MB planned, {measured / 1e6:,.0f} MB measured"
        yield Check(f"{name}, memory", abs(error) <= ERROR, found, f"within {ERROR:.0%}")


def _flops(device: torch.device) -> Iterator[Finding]:
    """Compare the FLOPs of a planned step with those of the operators of a real one."""
    from stages.base import Facts
    from xray.planning.fake_step import rehearse

    steps = StageSteps("clip", toy_settings("clip", {"model": {"keep_rate": 0.7}}), device)
    planned = rehearse(steps.config, Facts(), PROGRESS).flops
    with CountedFlops() as counted:
        steps.step()
    steps.engine.destroy()
    # The plan's batch has no language model either, and its sentence vectors are as wide.
    error = planned / counted.flops - 1
    found = f"{error:+.1%}: {planned:,} planned, {counted.flops:,} counted"
    yield Check("clip, FLOPs", abs(error) <= FLOP_ERROR, found, f"within {FLOP_ERROR:.0%}")


class CountedFlops(TorchDispatchMode):
    """Counter of the FLOPs of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in FLOPS:
            count = FLOPS[function._overloadpacket]
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result
