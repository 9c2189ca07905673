"""Mean and standard deviation that pretrained weights were trained with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xray.config import ModelConfig
from xray.errors import ConfigError
from xray.models.hub import hub
from xray.models.weight_loading import FOLDER, HUBS

Normalisation = tuple[list[float], list[float]]  # mean and std of red, green and blue, in [0, 1]
# Files beside weights, and the places in them that hold mean and std.
BESIDE = {
    "open_clip_config.json": [("preprocess_cfg", "mean", "std")],
    "preprocessor_config.json": [("", "image_mean", "image_std")],
    "config.json": [
        ("pretrained_cfg", "mean", "std"),
        ("", "mean", "std"),
        ("data", "mean", "std"),
    ],
}


def normalisation_of(config: ModelConfig) -> Normalisation | None:
    """Return mean and std of the weights that `model.pretrained` names; None if nothing says them.

    They come from timm's table of released weights, from the config.json of a hub name or folder,
    or from a JSON file beside a file of weights (timm's, transformers' or open_clip's). Raises
    ConfigError if the hub does not answer.
    """
    source = config.pretrained
    if source.startswith(FOLDER):
        return _beside(Path(source.removeprefix(FOLDER)))
    if source == "timm" or source.startswith(HUBS):
        return _of_timm(config.name if source == "timm" else source, source)
    return _beside(Path(source).parent)


def of_release(name: str) -> Normalisation | None:
    """Return mean and std of a released model by timm's name; None if timm does not know it."""
    from timm.models import get_pretrained_cfg, is_model

    known = get_pretrained_cfg(name) if is_model(name) else None
    return None if known is None else (list(known.mean), list(known.std))


def _of_timm(name: str, source: str) -> Normalisation | None:
    prefix, _, model = name.rpartition(":")
    found = of_release(model.removeprefix("timm/"))
    if found or not prefix:
        return found
    from timm.models import load_model_config_from_hf

    with hub("download the folder, and set model.pretrained to local-dir:FOLDER") as explain:
        try:
            settings: Any = load_model_config_from_hf(model)[0]
        except Exception as error:  # timm and the hub raise many types
            raise ConfigError(
                f"timm finds no config for model.pretrained={source}: {explain(error)}"
            ) from error
    return _pair(settings, "mean", "std")


def _beside(folder: Path) -> Normalisation | None:
    for name, places in BESIDE.items():
        try:
            content = json.loads((folder / name).read_bytes())
        except (OSError, ValueError):  # none, or a file of something else
            continue
        for section, mean, std in places:
            part = content.get(section) if section and isinstance(content, dict) else content
            if found := _pair(part, mean, std):
                return found
    return None


def _pair(part: Any, mean: str, std: str) -> Normalisation | None:
    """Read mean and std from a mapping; None unless both are three usable numbers."""
    if not isinstance(part, Mapping):
        return None
    pair = []
    for key in (mean, std):
        value = part.get(key)
        if not isinstance(value, list | tuple) or len(value) != 3:
            return None
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in value):
            return None
        pair.append([float(x) for x in value])
    return (pair[0], pair[1]) if min(pair[1]) > 0 else None
