"""What an ablation's stage runs take, and the plan of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stages.base import text_section
from xray.ablations.trials import Ablation, Trial, samples_of, stage_runs
from xray.errors import XrayError
from xray.files import write_text
from xray.planning.estimate import resources
from xray.planning.known_inputs import known
from xray.progress import progress_bar
from xray.reports.tables import ResultTable, short

Flops = dict[str, float | None]  # by stage run; None where the text tower is not known


def flops_of(ablation: Ablation, store: Path | None) -> Flops:
    """Training FLOPs of every stage run, forward and backward, as `xray plan` counts them.

    store: a file that keeps them. Seeds do not matter: those of the first one are counted.
    """
    first = ablation.trials[: len(ablation.arms)]
    counted: Flops = json.loads(store.read_text()) if store and store.is_file() else {}
    with progress_bar("counting FLOPs") as tell:
        for number, trial in enumerate(first, start=1):
            if not set(trial.keys.values()) <= counted.keys():
                try:
                    counted |= _counted(trial, counted)
                except XrayError as error:
                    raise type(error)(f"arm {trial.arm}: {error}") from error
            tell(number, len(first))
    if store:
        known_ones = {key: flops for key, flops in counted.items() if flops is not None}
        write_text(store, json.dumps(known_ones, indent=1))
    by_arm = {
        trial.arm: {stage: counted[key] for stage, key in trial.keys.items()} for trial in first
    }
    return {
        key: by_arm[trial.arm][stage]
        for trial in ablation.trials
        for stage, key in trial.keys.items()
    }


def _counted(trial: Trial, before: Flops) -> Flops:
    runs, found = trial.recipe.runs, dict[str, float | None]()
    with known(runs, trial.recipe.prepare.llm) as facts:
        for run, own in zip(runs, facts, strict=True):
            key = trial.keys[run.stage]
            if key in before:
                continue
            unknown = text_section(run) is not None and own.facts.llm is None  # no folder yet
            found[key] = None if unknown else resources(run, own.facts, 1).flops * run.steps
    return found


def plan_of(ablation: Ablation, flops: Flops) -> ResultTable:
    """A row per stage run that differs in more than the seed, and their sum."""
    config, runs = ablation.config, stage_runs(ablation)
    table = ResultTable(
        f"{config.name} over {config.base} -> {ablation.out}",
        ("stage", "of arms", "runs", "samples each", "TFLOP each", "state"),
    )
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for key, uses in runs.items():
        arms = tuple(trial.arm for trial, _ in uses)
        rows.setdefault((uses[0][1].stage, arms), []).append(key)
    total, left = 0.0, 0
    for (stage, arms), keys in rows.items():
        run = runs[keys[0]][0][1]
        each = flops[keys[0]]
        done = sum((ablation.out / "stages" / key / "artifact").is_dir() for key in keys)
        total, left = total + (each or 0.0) * len(keys), left + len(keys) - done
        table.rows.append(
            (
                stage,
                "all" if len(arms) == len(ablation.arms) > 1 else "\n".join(arms),
                str(len(keys)),
                short(samples_of(run)),
                "unknown" if each is None else tera(each),
                f"{done}/{len(keys)} done",
            )
        )
    alone = sum(len(trial.recipe.runs) for trial in ablation.trials)
    table.rows.append(
        ("in all", f"{alone} in {len(ablation.trials)} runs", str(len(runs)), "",
         tera(total), f"{left} to train")
    )  # fmt: skip
    return table


def tera(flops: float) -> str:
    """FLOPs as TFLOP."""
    return f"{flops / 1e12:,.3g}"


def arm_flops(trials: Sequence[Trial], flops: Flops) -> float | None:
    """Of one run of an arm, shared stages included; None where a part is not known."""
    parts = [flops[key] for key in trials[0].keys.values()]
    return None if None in parts else sum(part for part in parts if part is not None)
