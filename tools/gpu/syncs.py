"""Reads of the device by the host in a warmed-up step of every stage."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tools.common.device_waits import SYNCHRONIZE, DeviceWaits
from tools.gpu.findings import Check, Finding, Number, Scale
from tools.gpu.stage_steps import StageSteps, tiny_llm, toy_settings

MICROS = {"train": {"micro_batch": 2}}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mae": ("mae", []),
    "hashtag": ("hashtag", []),
    "text": ("text", []),
    "clip": ("clip", []),
    "clip, live text": ("clip", [{"text": {"features": "live"}}]),
    "clip, gradient cache": ("clip", [MICROS]),
    "clip, ZeRO 2": ("clip", [{"zero": {"stage": 2}}]),
}
# Reads per step that are accepted, by the start of their place. The loop reads losses and the norm
# once per step; DeepSpeed's ZeRO computes its norm on the host; transformers looks for padding.
# On a CPU, values that are made there to be read there count as well.
ALLOWED = {
    "xray/training/": 4,
    "deepspeed/runtime/": 8,
    "torch/optim/": 4,
    "transformers/": 4,
}
ON_CPU = {"stages/hashtag.py": 1}
WARM = 2


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Count the reads of a step, and the waits for the whole device, of which there are none."""
    allowed = ALLOWED | (ON_CPU if device.type == "cpu" else {})
    with TemporaryDirectory() as folder:
        llm = tiny_llm(Path(folder))
        for name, (stage, settings) in CASES.items():
            reads = stage == "text" or "live" in name
            more = [*settings, {"train": {"precision": "bf16"}}]
            steps = StageSteps(stage, toy_settings(stage, *more), device, llm if reads else None)
            for number in range(WARM):
                steps.step(number)
            with DeviceWaits(device) as reader:
                steps.step(WARM)
            steps.engine.destroy()
            yield Number(f"{name}, reads by place", dict(reader.counts.most_common()))
            waits = {k: n for k, n in reader.counts.items() if k.endswith(f" {SYNCHRONIZE}")}
            yield Check(f"{name}, waits for the device", not waits, waits, "none")
            found = excess(reader.counts - Counter(waits), allowed)
            yield Check(f"{name}, reads beyond the accepted ones", not found, found, "none")


def excess(counts: Counter[str], allowed: dict[str, int]) -> dict[str, int]:
    """Return the reads by place that no entry of `allowed` covers, by the start of the place."""
    found: dict[str, int] = {}
    sums = Counter[str]()
    for place, number in counts.items():
        start = next((s for s in allowed if re.match(re.escape(s), place)), None)
        if start is None:
            found[place] = number
        else:
            sums[start] += number
    return found | {s: n for s, n in sums.items() if n > allowed[s]}
