"""Kinds of names that an import takes, told apart without torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB = "hf-hub:"
OPEN_CLIP = "open_clip:"  # open_clip:MODEL:TAG, a name of open_clip's list of released weights
CONFIGS = ("open_clip_config.json", "config.json")  # one of them is in every folder of weights
CHECKPOINTS = (".safetensors", ".pth")  # endings of files in the layout of MAE or VideoMAE
REPOSITORY = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")  # ORG/NAME of the hub


def is_repository(name: str) -> bool:
    """Tell if a name is ORG/NAME, and no folder ORG exists."""
    return bool(REPOSITORY.fullmatch(name)) and not Path(name).parent.exists()


def is_released(name: str) -> bool:
    """Tell if a name is of released weights: of a hub, a file, or a folder that is no artifact.

    ORG/NAME is of the hub if there is no folder ORG, in which it could be a misspelt path.
    """
    if name.startswith((HUB, OPEN_CLIP)):
        return True
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path.suffix in CHECKPOINTS
    if not path.parent.exists():
        return is_repository(name)
    ours = any((path / own).is_file() for own in ("manifest.json", "artifact/manifest.json"))
    return not ours and any((path / config).is_file() for config in CONFIGS)
