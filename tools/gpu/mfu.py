"""Images per second and MFU of the mae and clip stages, eager and compiled, against open_clip."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from tools.gpu.findings import Check, Finding, Note, Number, Scale
from tools.gpu.stage_steps import StageSteps, toy_settings
from xray.training.gpu_specs import gpu_of

MODELS = {"B/16": "vit_base_patch16_224", "L/16": "vit_large_patch16_224"}
BATCH = {("mae", "B/16"): 256, ("mae", "L/16"): 128, ("clip", "B/16"): 256, ("clip", "L/16"): 96}
KEEP = (1.0, 0.7, 0.5)
# (stage, model, compiled, keep rates), the most telling ones first
CASES = [
    ("mae", "B/16", False, (1.0,)),
    ("clip", "B/16", False, KEEP),
    ("mae", "B/16", True, (1.0,)),
    ("clip", "B/16", True, (1.0, 0.7)),
    ("open_clip", "B/16", False, (1.0,)),
    ("mae", "L/16", False, (1.0,)),
    ("clip", "L/16", False, KEEP),
    ("clip", "L/16", True, (0.7,)),
    ("mae", "L/16", True, (1.0,)),
    ("open_clip", "B/16", True, (1.0,)),
]
LEAST = 8.0  # seconds that must remain for another case
BOUND = 0.9  # smallest share of its bound that the speed-up of keep rate .7 reaches
TOP = 15  # kernels in the results


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Time training steps through the engine with ZeRO 0, in bf16."""
    gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    peak = None if gpu is None else gpu.peak("bf16")
    for stage, model, compiled, rates in CASES:
        if scale.toy and model != "B/16":  # the toy has one size
            continue
        name = f"{stage} {model} {'compiled' if compiled else 'eager'}"
        if scale.left() < LEAST:
            yield Note(f"{name}: no time left")
            continue
        torch._dynamo.reset()
        if stage == "open_clip":
            yield from _open_clip(name, device, scale, compiled)
        else:
            yield from _stage(name, device, scale, peak, (stage, model, compiled, rates))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def compiler(scale: Scale) -> AbstractContextManager[Any]:
    """Return a context in which torch.compile of toy models generates no code, to save time."""
    if not scale.toy:
        return nullcontext()
    return patch.object(torch, "compile", partial(torch.compile, backend="eager"))


def _settings(stage: str, model: str, compiled: bool, scale: Scale) -> dict[str, Any]:
    samples = 4 if scale.toy else BATCH[stage, model]
    more = {
        "data": {"blocks": [{"source": "images", "samples": samples}]},
        "train": {"precision": "bf16", "compile": compiled},
    }
    if scale.toy:
        return toy_settings(stage, more)
    large = {"model": {"name": MODELS[model], "kwargs": {}}, "data": {"resolution": 224}}
    if stage == "mae":
        large["mae"] = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
    else:
        large["clip"] = {"embed_dim": 512, "adapter_blocks": 2}
    settings = toy_settings(stage, more, large)
    settings["model"]["kwargs"] = {}  # merging keeps the toy's
    return settings


def _stage(
    name: str, device: torch.device, scale: Scale, peak: float | None, case: tuple[Any, ...]
) -> Iterator[Finding]:
    """Time a stage's step at its keep rates, with one module for all of them."""
    stage, model, compiled, rates = case
    settings = _settings(stage, model, compiled, scale)
    with compiler(scale):
        steps = StageSteps(stage, settings, device, build_on=device)
        speeds: dict[float, float] = {}
        macs: dict[float, int] = {}
        for rate in rates:
            title = name + (f", keep rate {rate:g}" if stage == "clip" else "")
            steps.config.model.keep_rate = rate
            macs[rate], start = steps.macs(), time.monotonic()
            seconds, losses = timed(steps.step, device, scale)
            speeds[rate] = steps.samples / seconds
            flops = 6 * macs[rate] / seconds
            yield Number(f"{title}, images/s", round(speeds[rate], 1))
            yield Number(f"{title}, TFLOP/s", flops / 1e12)
            if peak is not None:
                yield Number(f"{title}, MFU", round(flops / peak, 3))
            finite = all(loss == loss and abs(loss) < float("inf") for loss in losses)
            yield Check(f"{title}, losses are finite", finite, losses[-1], "finite")
            yield from _memory(title, device)
            if model == "B/16":
                yield from _kernels(title, partial(steps.step, 0), device)
            yield Number(f"{title}, s of the whole case", round(time.monotonic() - start, 1))
    steps.engine.destroy()
    if {1.0, 0.7} <= speeds.keys():
        share = speeds[0.7] / speeds[1.0] / (macs[1.0] / macs[0.7])
        title = f"{name}, speed-up of keep rate .7 over its bound"
        if scale.toy:
            yield Number(title, share)
        else:
            yield Check(title, share >= BOUND, round(share, 3), f">= {BOUND}")


def timed(
    step: Callable[[int], float], device: torch.device, scale: Scale
) -> tuple[float, list[float]]:
    """Return the seconds of a step, without warm-up, and the losses of all steps."""
    warm, counted = (1, 1) if scale.toy else (3, 8)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses = [step(number) for number in range(warm)]
    _wait(device)
    start = time.perf_counter()
    losses += [step(number) for number in range(warm, warm + counted)]
    _wait(device)
    return (time.perf_counter() - start) / counted, losses


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(title: str, device: torch.device) -> Iterator[Finding]:
    if device.type == "cuda":
        yield Number(f"{title}, GB allocated", torch.cuda.max_memory_allocated(device) / 1e9)
        yield Number(f"{title}, GB reserved", torch.cuda.max_memory_reserved(device) / 1e9)


def _kernels(title: str, step: Callable[[], Any], device: torch.device) -> Iterator[Finding]:
    """Profile a step: number of kernels, share of the time in which the device works, longest ones.

    On a CPU, operators take the place of kernels.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        step()
        _wait(device)
        elapsed = time.perf_counter() - start
    which = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [(getattr(row, which), row.count, row.key) for row in profiler.key_averages()]
    rows = sorted((row for row in rows if row[0]), reverse=True)
    yield Number(f"{title}, kernels per step", sum(count for _, count, _ in rows))
    busy = sum(micros for micros, _, _ in rows) / 1e6 / elapsed
    yield Number(f"{title}, share of a profiled step in kernels", round(busy, 3))
    top = [[round(micros / 1e3, 3), count, key[:80]] for micros, count, key in rows[:TOP]]
    yield Number(f"{title}, longest kernels: ms, calls, name", top)


def _open_clip(name: str, device: torch.device, scale: Scale, compiled: bool) -> Iterator[Finding]:
    """Time open_clip's step, and xray's with an equal text tower and the same batch."""
    try:
        from tools.common.clip_pair import Pair
    except ModuleNotFoundError as error:
        yield Note(f"{name}: needs the package {error.name}")
        return
    batch = 4 if scale.toy else BATCH["clip", "B/16"]
    options = argparse.Namespace(device=device.type, batch=batch, precision="bf16")
    pair = Pair("b16", options, scale.toy)
    if compiled:
        with compiler(scale):
            pair.reference.compile()
    calls = {"open_clip": pair.reference_step()}
    if not compiled:
        calls["xray with open_clip's text tower"] = pair.steps()["xray"]
    speeds = {}
    for what, call in calls.items():
        seconds, _ = timed(lambda _, call=call: call() or 0.0, device, scale)
        speeds[what] = batch / seconds
        title = f"{what} B/16 {'compiled' if compiled else 'eager'}, images/s"
        yield Number(title, round(speeds[what], 1))
        yield from _memory(f"{what} B/16", device)
    if len(speeds) == 2:
        ours, theirs = speeds["xray with open_clip's text tower"], speeds["open_clip"]
        yield Number("speed of a clip step, xray over open_clip", ours / theirs)
