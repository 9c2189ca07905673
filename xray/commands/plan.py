"""`xray plan`: memory, FLOPs, steps and hours of a recipe or a stage, without running it."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray.commands.common import Overrides, guarded
from xray.errors import ConfigError

if TYPE_CHECKING:
    from xray.planning.estimate import Change, Memory, Resources
    from xray.planning.known_inputs import Known
    from xray.training.throughput import Gpu

USABLE = 0.9  # share of a device's memory: CUDA, NCCL and fragmentation take the rest


@guarded
def plan(
    name: Annotated[str, typer.Argument(metavar="RECIPE|STAGE", help="A recipe, or a stage")],
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices")] = 1,
    gpu: Annotated[str, typer.Option(help="h100, a100, ... or none")] = "h100",
    gb: Annotated[float, typer.Option(min=0, help="Memory of a device (default: the GPU's)")] = 0,
    mfu: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Model FLOPs utilisation: share of the GPU's peak"),
    ] = 0.4,
    tags: Annotated[
        int, typer.Option(min=0, help="Size of a vocabulary that is not built yet")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Print what RECIPE or STAGE needs, without a GPU or data; exit code 1 if it does not fit.

    Memory is the peak of one device, from a step with tensors without values. Hours assume --mfu.
    A stage takes its settings from KEY=VALUE.
    """
    from xray.planning.estimate import cheapest_fit, resources
    from xray.planning.known_inputs import known
    from xray.training.throughput import GPUS

    if gpu != "none" and gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu} is not known: {', '.join(GPUS)} or none (with --gb)")
    device = GPUS.get(gpu)
    capacity = 1e9 * USABLE * (gb or (device.memory if device else 0))
    configs, tiny = _configs(name, overrides or [])
    rows, notes, fits = [], list[str](), True
    with known(configs, tiny, tags) as found:
        for config, own in zip(configs, found, strict=True):
            notes += [f"{config.stage}: {note}" for note in own.notes]
            if not own.countable:
                continue
            needs = resources(config, own.facts, devices)
            change = None
            if 0 < capacity < needs.memory.total:
                fits = False
                change = cheapest_fit(config, own.facts, devices, capacity)
                notes.append(_advice(config.stage, needs.memory, change, capacity))
            rows.append(_facts(needs, own, device, mfu, change))
    if as_json:
        print(
            json.dumps({"devices": devices, "gpu": gpu, "stages": rows, "notes": notes}, indent=1)
        )
    else:
        _print(rows, notes, f"{name} on {devices:,} x {gpu}", f"at an MFU of {mfu:g}")
    if not fits:
        raise SystemExit(1)


def _configs(name: str, overrides: list[str]) -> tuple[list[Any], Any]:
    """Return the stages' validated configs, and the tiny LLM that a recipe makes."""
    from stages import STAGES, stage_class
    from xray.config import loading as cfg

    if name not in STAGES:
        from xray.recipes.recipe import load_recipe

        recipe = load_recipe(name, overrides)
        return recipe.runs, recipe.prepare.llm
    config = cfg.load_config(stage_class(name).Config, name, cfg.parse_overrides(overrides))
    config.validate()
    return [config], None


def _advice(stage: str, memory: Memory, change: Change | None, capacity: float) -> str:
    needs = f"{stage} does not fit: it needs {_gb(memory.total)} of {_gb(capacity)} usable"
    if change is None:
        return f"{needs}; no setting makes it fit: use more devices or memory"
    host = f" and {_gb(change.memory.host)} of host memory" if change.memory.host else ""
    return f"{needs}; {change} makes it {_gb(change.memory.total)}{host}"


def _facts(
    needs: Resources, own: Known, gpu: Gpu | None, mfu: float, change: Change | None
) -> dict[str, Any]:
    """Return a stage's part of the JSON and of the table."""
    config, size = needs.config, needs.size
    epochs = {
        block.source: config.steps * block.samples / len(own.sources[block.source])
        if block.source in own.sources
        else None
        for block in config.blocks
    }
    return {
        "stage": config.stage,
        "parameters": size.trained + size.frozen,
        "trained": size.trained,
        "steps": config.steps,
        "samples": config.steps * config.global_batch,
        "epochs": epochs,
        "tokens_per_step": round(needs.tokens),
        "flops_per_step": round(needs.flops),
        "recomputed_flops": round(needs.recomputed),
        "micro_batches": needs.micros,
        "checkpoint_bytes": needs.checkpoint,
        "memory": {**dataclasses.asdict(needs.memory), "total": needs.memory.total},
        "hours": needs.hours(gpu, mfu) if gpu else None,
        "fits_with": change.settings if change else None,
    }


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


def _print(rows: list[dict[str, Any]], notes: list[str], title: str, how: str) -> None:
    """Print a table with a column per stage."""
    from xray.reports.tables import ResultTable, short

    table = ResultTable(title, ("", *(row["stage"] for row in rows)))

    def line(what: str, values: list[str]) -> None:
        table.rows.append((what, *values))

    line("parameters", [short(r["parameters"]) for r in rows])
    line("trained parameters", [short(r["trained"]) for r in rows])
    line("samples", [short(r["samples"]) for r in rows])
    line("steps", [short(r["steps"]) for r in rows])
    line("epochs", ["\n".join(_epochs(r)) for r in rows])
    line("tokens per step", [short(r["tokens_per_step"]) for r in rows])
    line("TFLOP per step", [f"{r['flops_per_step'] / 1e12:,.4g}" for r in rows])
    line("of it for the gradient cache", [f"{r['recomputed_flops'] / 1e12:,.4g}" for r in rows])
    line("micro-batches", [str(r["micro_batches"]) for r in rows])
    line("checkpoint", [_gb(r["checkpoint_bytes"]) for r in rows])
    for part, words in PARTS.items():
        line(f"memory: {words}", [_gb(r["memory"][part]) for r in rows])
    if rows and rows[0]["hours"] is not None:
        line(f"hours {how}", [f"{r['hours']:,.3g}" for r in rows])
    table.print()
    for note in notes:
        print(note)


def _epochs(row: dict[str, Any]) -> list[str]:
    return [
        f"{source} " + ("unknown" if value is None else f"{value:.3g}")
        for source, value in row["epochs"].items()
    ]


def _gb(size: float) -> str:
    """Format bytes as GB, or as MB below one."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
