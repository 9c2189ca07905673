"""Stages, in the order they run. To add one: its file, configs/stage/NAME.yaml and a line here."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from xray.config import nearest
from xray.errors import ConfigError

if TYPE_CHECKING:
    from stages.base import Stage
    from xray.config import RunConfig
    from xray.config.loading import Layer


class Place(NamedTuple):
    """Places, `module:Class`, of a stage and of its settings, which can be read without torch."""

    stage: str
    config: str


STAGES = {
    "mae": Place("stages.mae:MaeStage", "stages.mae_config:MaeConfig"),
    "hashtag": Place("stages.hashtag:HashtagStage", "stages.hashtag_config:HashtagConfig"),
    "text": Place("stages.text:TextStage", "stages.text_config:TextRunConfig"),
    "clip": Place("stages.clip:ClipStage", "stages.clip_config:ClipConfig"),
}


def stage_class(name: str) -> type[Stage]:
    """Return the class of a stage by name; raises ConfigError if there is none."""
    check_stage(name)
    return _imported(STAGES[name].stage)


def stage_config(name: str) -> type[RunConfig]:
    """Return the class of a stage's settings, without importing the stage; raises ConfigError."""
    check_stage(name)
    return _imported(STAGES[name].config)


def load_settings(name: str, *layers: Layer, init_from: Sequence[str] = ()) -> RunConfig:
    """Load the settings of a stage's run from layers, on top of those of its parents.

    init_from: names that replace the layers' own. They name artifacts, or released weights that are
    imported here. Raises ConfigError as `load_config`, and errors as `artifact_of`.
    """
    from stages.parent_settings import of_imported, parents_at
    from xray.config.loading import load_config
    from xray.imports.cached import artifact_of
    from xray.imports.place import is_repository

    schema = stage_config(name)
    config = load_config(schema, name, *layers)
    paths = [artifact_of(name) for name in init_from]
    if not init_from:  # ORG/NAME in a layer may be the folder of a run that comes first
        own = config.init_from
        paths = [name if is_repository(name) else artifact_of(name) for name in own]
    parents = parents_at(paths)
    taken = {**of_imported(parents), **config.from_parents(parents)}
    if taken:
        config = load_config(schema, name, taken, *layers)
    config.init_from = paths
    config.out = os.path.expanduser(config.out)
    config.model.pretrained = os.path.expanduser(config.model.pretrained)
    return config


def check_stage(name: str) -> None:
    """Raise ConfigError for a name that is not a stage's."""
    if name not in STAGES:
        raise ConfigError(
            f"unknown stage {name!r}: there are {', '.join(STAGES)}{nearest(name, STAGES)}"
        )


def _imported(place: str) -> Any:
    module, attribute = place.split(":")
    return getattr(importlib.import_module(module), attribute)
