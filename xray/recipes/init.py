"""A first recipe for a user's data and machine: choices, lengths that fit the time, its text."""

from __future__ import annotations

import copy
import math
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xray.config import RunConfig
from xray.config import loading as cfg
from xray.errors import DataError
from xray.files import write_text
from xray.planning.plan import Plan, make_plan
from xray.recipes.first_recipe import (
    ADAPT,
    DISPENSABLE,
    LENGTHS,
    LENGTHS_ADAPTED,
    Draft,
    Length,
    draft,
    scales_for,
)
from xray.recipes.machine import GPU_SHARE, Machine, find_machine
from xray.recipes.recipe import load_recipe, recipe_layers, resolve_recipe
from xray.recipes.survey import Survey, described, survey

HOURS_CPU, HOURS_GPU = 1 / 6, 8.0  # to train, if --hours is not given
WIDTH = 98
LOGGED = 25  # lines of metrics of the shortest stage, at least
ORDER = ("base", "stages", "data", "model", "train", "prepare", *LENGTHS, "eval")


Runs = dict[str, RunConfig]  # by stage, each with the length of an epoch


@dataclass
class InitOptions:
    """Options of `xray init`."""

    gpus: int | None = None
    gpu: str = ""
    hours: float = 0.0
    pretrained: str = ""
    text_llm: str = ""


@dataclass(frozen=True)
class Timed:
    """A stage's length, and an estimate of its time; seconds: None if it is not known."""

    epochs: float
    steps: int
    samples: int
    seconds: float | None


def write_first_recipe(path: Path, data: str, options: InitOptions) -> list[str]:
    """Write a recipe for data, and return lines for the user.

    Raises ConfigError for an unknown GPU, DataError if there is nothing to train on.
    """
    seen = survey(data)
    machine = find_machine(options.gpus, options.gpu)
    hours = options.hours or (HOURS_GPU if machine.gpus else HOURS_CPU)
    made, plan, runs, times = _choose(seen, machine, hours, options, path.stem)
    _add_rates(made, runs)
    _add_lengths(made, times)
    made.settings = {key: made.settings[key] for key in ORDER if key in made.settings}
    notes = _add_changes(made, plan)
    if machine.gpus and made.scale.base in ("small", "adapt"):
        made.settings.setdefault("train", {})["precision"] = "bf16"
    write_text(path, _text(path, made, machine, times))
    given = ["text.llm=there"] if made.settings.get("text", {}).get("llm") == "???" else []
    load_recipe(str(path), given)  # raises for a recipe that is not valid
    found = [f"{own.name}: {described(own)}" for own in seen.training]
    found += [f"{own.name}: {described(own)}, held out" for own in seen.held_out]
    wrote = f"wrote {path}: {made.scale.why}; stages {', '.join(made.stages)}. Next:"
    return [*found, *_head(machine, times), *notes, wrote, *_next(path, made, machine)]


def _choose(
    seen: Survey, machine: Machine, hours: float, options: InitOptions, name: str
) -> tuple[Draft, Plan, Runs, dict[str, Timed]]:
    """Return the largest scale whose stages all get their least epochs in the time.

    At the smallest scale, stages are left out until they do.
    """
    given, budget = (options.pretrained, options.text_llm), 3600 * hours
    scales = scales_for(seen, machine, options.pretrained)
    tries = [(scale, ()) for scale in scales]
    left_out = [DISPENSABLE[:count] for count in range(1, len(DISPENSABLE) + 1)]
    for scale, without in [*tries, *((scales[-1], stages) for stages in left_out)]:
        made = draft(scale, seen, machine, *given, without)
        if not made.stages and not without:
            raise DataError(
                f"{seen.root} has neither captions, tags nor classes, which a pretrained tower is "
                "adapted with: leave out --pretrained to train on the pixels alone"
            )
        if not made.stages:
            break
        plan, runs = _plan(made, machine, name)
        times = _lengths(made, plan, runs, budget, machine.speed)
        chosen = made, plan, runs, times
        if sum(timed.seconds or 0.0 for timed in times.values()) <= 1.05 * budget:
            break
    return chosen


def _plan(made: Draft, machine: Machine, name: str) -> tuple[Plan, Runs]:
    """Return the plan of a draft, and the config of each stage with the length of one epoch."""
    layer: dict[str, Any] = copy.deepcopy(made.settings)
    base = layer.pop("base")
    layer |= {"name": name, "out": f"runs/{name}", "train": {"epochs": 1}}
    if layer.get("text", {}).get("llm") == "???":
        layer["text"]["llm"] = "not-given"
    recipe = resolve_recipe([*recipe_layers(base, None), layer])
    gpu, llm = machine.gpu or "none", recipe.prepare.llm
    plan = make_plan(recipe.runs, llm, 0, machine.devices, gpu, 0.0, GPU_SHARE)
    sizes = {stage: made.sizes | made.kept.get(stage, {}) for stage in made.stages}
    return plan, {run.stage: run.with_length(sizes[run.stage]) for run in recipe.runs}


def _lengths(made: Draft, plan: Plan, runs: Runs, seconds: float, speed: float) -> dict[str, Timed]:
    """Divide the time over the stages by their shares; what one cannot use goes to the others."""
    flops = {row["stage"]: row["flops_per_step"] for row in plan.stages}
    each = {s: runs[s].steps * flops[s] / speed for s in made.stages if s in flops}
    table = LENGTHS_ADAPTED if made.scale is ADAPT else LENGTHS
    chosen = _divided({stage: table[stage] for stage in each}, each, seconds)
    times = {}
    for stage in made.stages:
        steps, samples = runs[stage].steps, runs[stage].train.samples
        number = _rounded(chosen.get(stage, table[stage].least))
        cost = number * each[stage] if stage in each else None
        times[stage] = Timed(number, round(steps * number), round(samples * number), cost)
    return times


def _divided(table: dict[str, Length], each: dict[str, float], seconds: float) -> dict[str, float]:
    """Return the epochs of stages whose epochs take `each` seconds, in about `seconds` in all."""
    fixed: dict[str, float] = {}
    while open_stages := [stage for stage in table if stage not in fixed]:
        left = seconds - sum(fixed[stage] * each[stage] for stage in fixed)
        shares = sum(table[stage].share for stage in open_stages)
        wanted = {s: left * table[s].share / shares / each[s] for s in open_stages}
        over = {s: table[s].least for s in open_stages if wanted[s] < table[s].least}
        over = over or {s: table[s].most for s in open_stages if wanted[s] > table[s].most}
        if not over:
            return fixed | wanted
        fixed |= over
    return fixed


def _rounded(epochs: float) -> float:
    """Round to two digits; whole epochs from 3 on."""
    if epochs < 3:
        return round(epochs, 1)
    return int(float(f"{epochs:.2g}"))


def _add_rates(made: Draft, runs: Runs) -> None:
    """Raise base_lr for steps of fewer samples than those of the recipe that this is based on.

    The peak learning rate, base_lr x batch / 256, then falls with the root of the batch.
    """
    for stage, run in runs.items():
        fewer = made.scale.batch / run.global_batch
        if fewer > 1.5:
            rate = float(f"{run.optim.base_lr * math.sqrt(fewer):.2g}")
            section = made.settings.setdefault(stage, {})
            section["optim"] = {**section.get("optim", {}), "base_lr": rate}
            peak = rate * run.global_batch / 256
            made.comments[f"{stage}.optim"] = (
                f"peak {peak:.2g} at {run.global_batch} samples a step"
            )


def _add_lengths(made: Draft, times: dict[str, Timed]) -> None:
    for stage, timed in times.items():
        section = made.settings.setdefault(stage, {})
        section["train"] = {**section.get("train", {}), "epochs": timed.epochs}
        told = f"{timed.samples:,} samples in {timed.steps:,} steps, {in_words(timed.seconds)}"
        made.comments[f"{stage}.train"] = told
    shortest = min(timed.steps for timed in times.values())
    made.settings["train"] = {"log_every": max(1, min(50, shortest // LOGGED))}


def _add_changes(made: Draft, plan: Plan) -> list[str]:
    """Write what the plan changes so that a stage fits into memory; return what it cannot mend."""
    for row in plan.stages:
        for key, value in (row["fits_with"] or {}).items():
            value = {"true": True}.get(value, value)
            layer = cfg.merge(made.settings[row["stage"]], cfg.parse_overrides([f"{key}={value}"]))
            made.settings[row["stage"]] = layer
        if row["fits_with"]:
            memory = f"{row['memory']['total'] / 1e9:.1f} GB"
            made.comments[row["stage"]] = f"changed to fit: it would need {memory} per device"
    return [note for note in plan.notes if "no setting makes it fit" in note]


def in_words(seconds: float | None) -> str:
    """Describe an estimated time."""
    if seconds is None:
        return "time not known before text.llm is given"
    for size, word in ((86400.0, "day"), (3600.0, "hour"), (60.0, "minute")):
        if seconds >= 0.95 * size:
            number = f"{seconds / size:.2g}"
            return f"about {number} {word}{'s' * (number != '1')}"
    return "less than a minute"


# text -------------------------------------------------------------------------------------------


def _head(machine: Machine, times: dict[str, Timed]) -> list[str]:
    """Describe the machine and the time."""
    total = sum(timed.seconds for timed in times.values() if timed.seconds is not None)
    parts = " + ".join(f"{stage} {in_words(timed.seconds)}" for stage, timed in times.items())
    parts = parts.replace("about ", "")
    return [f"machine: {machine}", f"time: {in_words(total)}, estimated ({parts})"]


def _next(path: Path, made: Draft, machine: Machine) -> list[str]:
    """Return the commands that use the recipe."""
    launch = ""
    if machine.gpus > 8:
        launch = "srun python -m "
    elif machine.gpus > 1:
        launch = f"torchrun --nproc_per_node {machine.gpus} -m "
    missing = made.settings.get("text", {}).get("llm") == "???"
    command = f"xray run {shlex.quote(str(path))}" + " text.llm=NAME" * missing
    return [f"  {command} --plan", f"  {launch}{command}"]


def _text(path: Path, made: Draft, machine: Machine, times: dict[str, Timed]) -> str:
    """Return the recipe as yaml, with a comment above each choice."""
    lines = ["# A first recipe, written by `xray init`. Change what you like: docs/training.md."]
    for line in _head(machine, times):
        lines += _comment(line, "")
    lines += [f"# {line}" for line in _next(path, made, machine)]
    for key, value in made.settings.items():
        lines += _entry(key, value, "", key, made.comments)
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    wide = WIDTH - len(indent)
    return [f"{indent}# {line}" for part in text.splitlines() for line in textwrap.wrap(part, wide)]


def _entry(name: str, value: Any, indent: str, path: str, comments: dict[str, str]) -> list[str]:
    """Return the lines of a setting: over several lines if a part of it has a comment."""
    lines = _comment(comments.get(path, ""), indent)
    inner = f"{indent}  "
    if isinstance(value, dict) and any(key.startswith(f"{path}.") for key in comments):
        lines.append(f"{indent}{name}:")
        for key, part in value.items():
            lines += _entry(key, part, inner, f"{path}.{key}", comments)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        lines.append(f"{indent}{name}:")
        lines += [f"{inner}- {_flow(item)}" for item in value]
    elif isinstance(value, dict) and "???" in value.values():  # not valid inside braces
        lines.append(f"{indent}{name}:")
        lines += [f"{inner}{key}: {_flow(part)}" for key, part in value.items()]
    else:
        lines.append(f"{indent}{name}: {_flow(value)}")
    return lines


def _flow(value: Any) -> str:
    """Return a value as yaml in one line."""
    if value == "???":
        return "???"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
