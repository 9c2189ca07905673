"""Stages, in the order they run. To add one: its file, configs/stage/NAME.yaml and a line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from xray.config import nearest
from xray.errors import ConfigError

if TYPE_CHECKING:
    from stages.base import Stage

STAGES = {
    "mae": "stages.mae:MaeStage",
    "hashtag": "stages.hashtag:HashtagStage",
    "text": "stages.text:TextStage",
    "clip": "stages.clip:ClipStage",
}


def stage_class(name: str) -> type[Stage]:
    """Return the class of a stage by name; raises ConfigError if there is none."""
    if name not in STAGES:
        raise ConfigError(
            f"unknown stage {name!r}: there are {', '.join(STAGES)}{nearest(name, STAGES)}"
        )
    module, attribute = STAGES[name].split(":")
    return getattr(importlib.import_module(module), attribute)
