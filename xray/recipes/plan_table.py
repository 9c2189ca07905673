"""Table of the stages of a recipe, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages import stage_class
from xray.config import RunConfig
from xray.config.schedule import steps_of, value_at
from xray.recipes.recipe import Recipe
from xray.reports.tables import ResultTable, short
from xray.training.run import holds_another_run


def plan_table(recipe: Recipe) -> ResultTable:
    """Make a row per stage: parents, data, sizes, cost of a forward pass per sample, length,
    state."""
    table = ResultTable(
        f"{recipe.name} -> {recipe.out}",
        ("stage", "starts from", "batch", "GMACs each", "length", "peak lr", "state"),
    )
    for config in recipe.runs:
        parents = [
            str(Path(p).parent.name if p.endswith("artifact") else p) for p in config.init_from
        ]
        size, cost = _inputs(config)
        table.rows.append(
            (
                config.stage,
                "\n+ ".join(parents) or "scratch",
                f"{' + '.join(f'{b.samples} {b.source}' for b in config.blocks)}\n{size}",
                cost,
                f"{short(config.steps * config.global_batch)} samples\n{short(config.steps)} steps",
                f"{config.optim.base_lr * config.global_batch / 256:.2g}",
                _state(config),
            )
        )
    return table


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
