"""Training cost of an ablation's stage runs, and the plan table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from xray.ablations.trials import STAGE_RUNS, Ablation, Trial, samples_of, stage_runs
from xray.config.run import text_section
from xray.errors import XrayError
from xray.files import write_text
from xray.planning.estimate import resources
from xray.planning.known_inputs import known
from xray.progress import progress_bar
from xray.records import read_record
from xray.reports.tables import ResultTable, short

Flops = dict[str, float | None]  # by stage run; None if the text tower does not exist yet


def flops_of(ablation: Ablation, store: Path | None) -> Flops:
    """Count the training FLOPs of every stage run, forward and backward, like `xray plan`.

    The count does not depend on the seed, so only the first seed is counted. store: JSON file that
    caches the counts, or None.
    """
    first = ablation.trials[: len(ablation.arms)]
    counted: Flops = {}
    if store and store.is_file():
        counted |= read_record(store, dict[str, float], advice="; delete it")
    with progress_bar("counting FLOPs") as update:
        for number, trial in enumerate(first, start=1):
            if not set(trial.keys.values()) <= counted.keys():
                try:
                    counted |= _counted(trial, counted)
                except XrayError as error:
                    raise type(error)(f"arm {trial.arm}: {error}") from error
            update(number, len(first))
    if store:
        cached = {key: flops for key, flops in counted.items() if flops is not None}
        write_text(store, json.dumps(cached, indent=1))
    counts = {(t.arm, stage): counted[key] for t in first for stage, key in t.keys.items()}
    return {key: counts[t.arm, s] for t in ablation.trials for s, key in t.keys.items()}


def _counted(trial: Trial, before: Flops) -> Flops:
    runs, counted = trial.recipe.runs, dict[str, float | None]()
    with known(runs, trial.recipe.prepare.llm) as inputs:
        for run, run_inputs in zip(runs, inputs, strict=True):
            key = trial.keys[run.stage]
            if key in before:
                continue
            facts = run_inputs.facts
            unknown = text_section(run) is not None and facts.llm is None  # no LLM folder yet
            counted[key] = None if unknown else resources(run, facts, 1).flops * run.steps
    return counted


def plan_of(ablation: Ablation, flops: Flops) -> ResultTable:
    """Make the plan table: one row per group of stage runs that differ only in the seed."""
    config, runs = ablation.config, stage_runs(ablation)
    table = ResultTable(
        f"{config.name} over {config.base} -> {ablation.out}",
        ("stage", "arms", "runs", "samples each", "TFLOP each", "state"),
    )
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for key, uses in runs.items():
        arms = tuple(trial.arm for trial, _ in uses)
        rows.setdefault((uses[0][1].stage, arms), []).append(key)
    total, remaining = 0.0, 0
    for (stage, arms), keys in rows.items():
        run = runs[keys[0]][0][1]
        each = flops[keys[0]]
        done = sum((ablation.out / STAGE_RUNS / key / "artifact").is_dir() for key in keys)
        total, remaining = total + (each or 0.0) * len(keys), remaining + len(keys) - done
        names = "all" if len(arms) == len(ablation.arms) > 1 else "\n".join(arms)
        samples, state = short(samples_of(run)), f"{done}/{len(keys)} done"
        table.rows.append((stage, names, str(len(keys)), samples, tera(each), state))
    unshared = sum(len(trial.recipe.runs) for trial in ablation.trials)
    of, left = f"{unshared} in {len(ablation.trials)} runs", f"{remaining} to train"
    table.rows.append(("total", of, str(len(runs)), "", tera(total), left))
    return table


def tera(flops: float | None) -> str:
    """Format FLOPs in units of TFLOP."""
    return "unknown" if flops is None else f"{flops / 1e12:,.3g}"


def arm_flops(trials: Sequence[Trial], flops: Flops) -> float | None:
    """Sum the FLOPs of one run of an arm, including shared stages; None if a part is unknown."""
    parts = [flops[key] for key in trials[0].keys.values()]
    return None if None in parts else sum(part for part in parts if part is not None)
