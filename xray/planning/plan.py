"""Plan of stages: what each needs, a change that makes it fit, and the table of `xray plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xray.config import RunConfig
from xray.config.model import LlmConfig
from xray.planning.estimate import Change, Memory, Resources, cheapest_fit, resources
from xray.planning.known_inputs import Known, known
from xray.reports.tables import ResultTable, figure, short
from xray.training.gpu_specs import GPUS, Gpu, check_gpu
from xray.training.length import length_advice, sizes_of
from xray.words import duration

USABLE = 0.9  # share of a device's memory: CUDA, NCCL and fragmentation take the rest
PARTS = {
    "weights": "weights",
    "llm": "LLM",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits and loss",
    "batch": "batch",
    "buffers": "DeepSpeed's buffers",
    "total": "total",
    "host": "host, per device",
}


@dataclass
class Plan:
    """Needs of each countable stage as JSON, notes, and True if all stages fit."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fits: bool = True

    def table(self, title: str, mfu: float) -> ResultTable:
        """Make a table with a column per stage."""
        rows = self.stages
        table = ResultTable(title, ("", *(row["stage"] for row in rows)))

        def line(what: str, values: list[str]) -> None:
            table.rows.append((what, *values))

        line("parameters", [short(r["parameters"]) for r in rows])
        line("trained parameters", [_share(r["trained"], r["parameters"]) for r in rows])
        line("samples", [_count(r["samples"]) for r in rows])
        line("steps", [_count(r["steps"]) for r in rows])
        line("epochs", ["\n".join(_epochs(r)) for r in rows])
        line("tokens per step", [short(r["tokens_per_step"]) for r in rows])
        line("TFLOP per step", [f"{r['flops_per_step'] / 1e12:,.4g}" for r in rows])
        line("of it for the gradient cache", [f"{r['recomputed_flops'] / 1e12:,.4g}" for r in rows])
        line("micro-batches", [str(r["micro_batches"]) for r in rows])
        line("checkpoint", [_gb(r["checkpoint_bytes"]) for r in rows])
        for part, words in PARTS.items():
            line(f"memory: {words}", [_gb(r["memory"][part]) for r in rows])
        if any(r["hours"] is not None for r in rows):
            hours = [r["hours"] for r in rows]
            times = ["unknown" if h is None else duration(3600 * h) for h in hours]
            line(f"time at an MFU of {mfu:g}", times)
        return table


def make_plan(
    configs: Sequence[RunConfig],
    tiny: LlmConfig | None,
    tags: int,
    devices: int,
    gpu: str,
    gb: float,
    mfu: float,
    recipe: bool = True,
) -> Plan:
    """Estimate stages on `devices` GPUs; tiny, tags: an LLM and a vocabulary still to be made.

    gpu: a name of GPUS, or "none". gb: memory of a device, 0 = the GPU's; without both, every stage
    fits. recipe: the notes name the keys of a recipe, otherwise of a stage. Raises ConfigError for
    an unknown GPU.
    """
    check_gpu(gpu)
    device = GPUS.get(gpu)
    capacity = 1e9 * USABLE * (gb or (device.memory if device else 0))
    plan = Plan()
    with known(configs, tiny, tags) as found:
        for given, own in zip(configs, found, strict=True):
            config = given.with_length(sizes_of(own.sources))
            plan.notes += [f"{config.stage}: {note}" for note in own.notes]
            plan.notes += _length_notes(config, own, f"{config.stage}." if recipe else "")
            if not own.countable:
                continue
            needs = resources(config, own.facts, devices)
            change = None
            if 0 < capacity < needs.memory.total:
                plan.fits = False
                change = cheapest_fit(config, own.facts, devices, capacity)
                plan.notes.append(_advice(config.stage, needs.memory, change, capacity))
            plan.stages.append(_facts(needs, own, device, mfu, change))
    return plan


def _length_notes(config: RunConfig, own: Known, section: str) -> list[str]:
    if config.train.epochs is None:
        return length_advice(config, sizes_of(own.sources), section)
    return [
        f"{config.stage}: the samples and hours of {section}train.epochs={config.train.epochs:g} "
        "follow from the data, which are not at hand: set data.root to their folder"
    ]


def _advice(stage: str, memory: Memory, change: Change | None, capacity: float) -> str:
    needs = f"{stage} does not fit: it needs {_gb(memory.total)} of {_gb(capacity)} usable"
    if change is None:
        return f"{needs}; no setting makes it fit: use more devices or memory"
    host = f" and {_gb(change.memory.host)} of host memory" if change.memory.host else ""
    return f"{needs}; {change} makes it {_gb(change.memory.total)}{host}"


def _facts(
    needs: Resources, own: Known, gpu: Gpu | None, mfu: float, change: Change | None
) -> dict[str, Any]:
    config, size = needs.config, needs.size
    known_length = config.train.epochs is None
    steps = config.steps if known_length else None
    passes = config.passes(sizes_of(own.sources), config.steps) if known_length else {}
    return {
        "stage": config.stage,
        "parameters": size.trained + size.frozen,
        "trained": size.trained,
        "steps": steps,
        "samples": steps and steps * config.global_batch,
        "epochs": {block.source: passes.get(block.source) for block in config.blocks},
        "tokens_per_step": round(needs.tokens),
        "flops_per_step": round(needs.flops),
        "recomputed_flops": round(needs.recomputed),
        "micro_batches": needs.micros,
        "checkpoint_bytes": needs.checkpoint,
        "memory": {**dataclasses.asdict(needs.memory), "total": needs.memory.total},
        "hours": needs.hours(gpu, mfu) if gpu and known_length else None,
        "fits_with": change.settings if change else None,
    }


def _count(number: int | None) -> str:
    return "unknown" if number is None else short(number)


def _share(trained: int, parameters: int) -> str:
    return f"{short(trained)} ({100 * trained / parameters:.3g} %)"


def _epochs(row: dict[str, Any]) -> list[str]:
    return [
        f"{source} " + ("unknown" if value is None else figure(value))
        for source, value in row["epochs"].items()
    ]


def _gb(size: float) -> str:
    """Format bytes as GB, or as MB below one."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
