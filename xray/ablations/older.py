"""Runs that are added to an ablation of before a default changed: they take the older default.

Otherwise the arms of one table would differ in more than their settings. The names of the stage
runs' folders do not depend on it, so finished runs are found. Folders in which earlier versions
mixed the defaults are reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stages import STAGES, stage_config
from xray.config import RunConfig
from xray.config import loading as cfg
from xray.config.identity import changed_defaults, lacking, with_older
from xray.records import read_record
from xray.words import some_of

if TYPE_CHECKING:
    from xray.ablations.trials import Ablation

R = TypeVar("R", bound=RunConfig)
RECORD = "run.json"


def older_defaults(stages: Path) -> dict[str, Any]:
    """Return the defaults that the runs in a folder began with, and that are others today.

    They are nested dicts of a run's settings. Raises ArtifactError for a damaged record.
    """
    found: dict[str, Any] = {}
    for file in sorted(stages.glob(f"*/{RECORD}")):
        stage = file.parent.name.rpartition("-")[0]
        if stage in STAGES:
            record = read_record(file, dict[str, Any], advice="; delete its folder")
            found = cfg.merge(found, lacking(stage_config(stage)(), record.get("config", {})))
    return found


def take_older(run: R, older: Mapping[str, Any]) -> tuple[R, dict[str, Any]]:
    """Give a run that has not begun the older defaults where it leaves them open.

    Returns the run, and its changed settings as keys of its section in a recipe.
    """
    if not older or (Path(run.out) / RECORD).exists():  # that one keeps what it began with
        return run, {}
    changed = with_older(run, older)
    layer = _changes(dataclasses.asdict(run), dataclasses.asdict(changed))
    own = layer.pop(run.stage, {})  # a recipe has the keys of this section beside the others
    return changed, layer | own


def mixed_defaults(ablation: Ablation) -> list[str]:
    """Describe each default in which begun runs of a stage differ, in one line.

    Earlier versions added runs with their own defaults to a folder of older ones. Raises
    ArtifactError for a damaged record.
    """
    found: dict[tuple[str, str], list[tuple[str, bool, str]]] = {}  # by stage and key
    for run in {run.out: run for trial in ablation.trials for run in trial.recipe.runs}.values():
        file = Path(run.out) / RECORD
        if file.exists():
            record = read_record(file, dict[str, Any], advice="; delete its folder")
            for key, value, older in changed_defaults(run, record.get("config", {})):
                found.setdefault((run.stage, key), []).append((str(value), older, file.parent.name))
    return [
        f"runs of stage {stage} differ in a default that no arm sets: {key} is {_groups(runs)}; "
        "for arms that differ in their own settings only, give another out="
        for (stage, key), runs in found.items()
        if len({value for value, _, _ in runs}) > 1 and any(older for _, older, _ in runs)
    ]


def _groups(runs: Sequence[tuple[str, bool, str]]) -> str:
    """List the values of a default, each with the runs that have it."""
    groups: dict[str, list[str]] = {}
    for value, _, name in runs:
        groups.setdefault(value, []).append(name)
    return ", ".join(f"{value} in {some_of(names)}" for value, names in groups.items())


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `new` that differ, as nested dicts."""
    return {
        name: _changes(old[name], value) if isinstance(value, dict) else value
        for name, value in new.items()
        if value != old[name]
    }
