"""Runs that are added to an ablation of before a default changed: they take the older default.

Otherwise the arms of one table would differ in more than their settings. The names of the stage
runs' folders do not depend on it, so finished runs are found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from stages import STAGES, stage_config
from xray.config import RunConfig
from xray.config import loading as cfg
from xray.config.identity import lacking, with_older
from xray.records import read_record

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


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `new` that differ, as nested dicts."""
    return {
        name: _changes(old[name], value) if isinstance(value, dict) else value
        for name, value in new.items()
        if value != old[name]
    }
