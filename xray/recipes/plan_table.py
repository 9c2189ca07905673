"""Plan of a recipe's run: the table of its stages, an estimate of its time, and odd lengths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stages import stage_class
from xray import dist
from xray.config import RunConfig
from xray.config.schedule import steps_of, value_at
from xray.errors import ConfigError
from xray.recipes.machine import find_machine
from xray.recipes.recipe import Recipe
from xray.reports.tables import ResultTable, figure, short
from xray.training.length import length_advice
from xray.training.run_record import holds_another_run
from xray.words import duration

BACKWARD = 2  # times the operations of a forward pass
Sizes = dict[str, dict[str, int]]  # samples of the sources at hand, by stage and source


def plan_table(recipe: Recipe, sizes: Sizes) -> ResultTable:
    """Make the table of a recipe's stages; raises ConfigError for one that cannot be built."""
    table = ResultTable(
        f"{recipe.name} -> {recipe.out}",
        ("stage", "starts from", "batch", "GMACs each", "length", "peak lr", "state"),
    )
    for given in recipe.runs:
        own = sizes.get(given.stage, {})
        config = given.with_length(own)
        parents = [Path(p).parent.name if p.endswith("artifact") else p for p in config.init_from]
        first = stage_class(config.stage)(config).first_weights()
        start = "\n+ ".join(parents) or os.path.basename(first)
        size, cost = _inputs(config)
        batch = f"{' + '.join(f'{b.samples} {b.source}' for b in config.blocks)}\n{size}"
        length = _length(config, own)
        lr = f"{config.optim.base_lr * config.global_batch / 256:.2g}"
        table.rows.append((config.stage, start, batch, cost, length, lr, _state(config)))
    return table


def _length(config: RunConfig, sizes: dict[str, int]) -> str:
    if config.train.epochs is not None:
        return f"{config.train.epochs:g} epochs"
    lines = [f"{short(config.steps * config.global_batch)} samples", f"{short(config.steps)} steps"]
    if passes := config.passes(sizes, config.steps):
        least, most = (figure(choose(passes.values())) for choose in (min, max))
        lines.append(f"{least} epochs" if least == most else f"{least} to {most} epochs")
    return "\n".join(lines)


def plan_notes(recipe: Recipe, sizes: Sizes) -> list[str]:
    """Return what is odd about a recipe's settings and lengths, each with a setting to change."""
    notes = [*recipe.notes]
    for run in recipe.runs:
        own = sizes.get(run.stage, {})
        notes += length_advice(run.with_length(own), own, f"{run.stage}.")
    return notes


def _state(config: RunConfig) -> str:
    out = Path(config.out)
    if holds_another_run(config):
        return "other settings there"
    if (out / "artifact" / "manifest.json").is_file():
        return "finished"
    return "continues" if (out / "run.json").is_file() else "new"


def _inputs(config: RunConfig) -> tuple[str, str]:
    """Return (pixels and frames over the stage, GMACs of an image + of a clip at the end)."""
    data, stage = config.data, stage_class(config.stage)(config)
    modalities = {data.sources[block.source].modality for block in config.blocks}
    clip = value_at(data.frames, 1.0)
    frames = [n for n, kind in ((1, "image"), (clip, "video")) if kind in modalities]
    macs = [stage.macs(n) for n in frames]
    if not any(macs):
        return "text", ""
    size = f"{_over_time(data.resolution)} px"
    if "video" in modalities:
        size += f" x {_over_time(data.frames)}"
    return size, " + ".join(f"{n / 1e9:.3g}" for n in macs)


def _over_time(schedule: Any) -> str:
    return ">".join(str(value) for _, value in steps_of(schedule))


def plan_time(recipe: Recipe, sizes: Sizes) -> str:
    """Estimate the time of the stages that have not begun, on this run's devices; "" if unknown.

    Stages that read only texts are left out.
    """
    runs = [run.with_length(sizes.get(run.stage, {})) for run in recipe.runs]
    work = [work_of(run) for run in runs if _state(run) == "new"]
    if not any(work):
        return ""
    on_gpu = dist.choose_device(recipe.runs[0].train.device).type == "cuda"
    try:
        machine = find_machine(dist.world_size() if on_gpu else 0, "")
    except ConfigError:  # a GPU of unknown speed
        return ""
    seconds = (1 + BACKWARD) * 2 * sum(work) / machine.speed
    told = f"about {duration(seconds)} (estimated, without texts and evaluation)"
    return f"time: {told}, on {machine}"


def work_of(config: RunConfig) -> float:
    """Count the multiply-adds of a stage on images and clips, in its forward passes; 0 for texts,
    and for a length in epochs of data that are not at hand.

    The time of a recipe's later stages is estimated from it and the time of the present one.
    """
    if config.train.epochs is not None:
        return 0.0
    stage, frames = stage_class(config.stage)(config), value_at(config.data.frames, 1.0)
    each = {"image": 1, "video": frames}
    kinds = [(block.samples, config.data.sources[block.source].modality) for block in config.blocks]
    step = sum(samples * stage.macs(each[kind]) for samples, kind in kinds if kind in each)
    return float(config.steps * step)
