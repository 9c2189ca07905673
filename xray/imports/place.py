"""Kinds of names that an import takes, told apart without torch."""

from __future__ import annotations

from pathlib import Path

HUB = "hf-hub:"
OPEN_CLIP = "open_clip:"  # open_clip:MODEL:TAG, a name of open_clip's list of released weights
CONFIGS = ("open_clip_config.json", "config.json")  # one of them is in every folder of weights


def is_released(name: str) -> bool:
    """Tell if a name is of released weights: of a hub, or a folder that is no artifact."""
    if name.startswith((HUB, OPEN_CLIP)):
        return True
    folder = Path(name).expanduser()
    ours = any((folder / own).is_file() for own in ("manifest.json", "artifact/manifest.json"))
    return not ours and any((folder / config).is_file() for config in CONFIGS)
