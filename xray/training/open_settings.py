"""Settings that a config leaves open, and that a new run decides when it begins."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from xray import dist
from xray.artifacts.artifact import Artifact
from xray.artifacts.manifest_config import data_config
from xray.config import DataConfig, ModelConfig, RunConfig
from xray.config.data import IMAGENET, PREPARATION
from xray.errors import ConfigError
from xray.models.normalisation import Normalisation, normalisation_of, of_release

log = logging.getLogger("xray")
C = TypeVar("C", bound=RunConfig)
SAME = 1e-3  # largest difference of a mean or std that was rounded


def decided(config: C, vision: Artifact | None, weights: ModelConfig | None) -> C:
    """Decide the settings that are left open, and return the config; as on rank 0. Collective.

    They are model.sincos, data.mean, data.std and data.resize. vision, weights: the artifact that
    the backbone starts from, and the settings of the weights that it would load; None without a
    backbone. A run that exists keeps its own values. Raises ConfigError if data.mean or data.std
    contradict the weights.
    """
    sincos = "rows" if config.model.rows_first else "columns"
    given = config.data.mean, config.data.std
    begun = (Path(config.out) / "run.json").exists() and all(given)
    if not dist.broadcast_object(begun):
        reading = "reading what the weights were trained with"
        given = dist.main_first(lambda: normalisation(config.data, vision, weights), reading)
    prepared = preparation(config.data, vision)
    sincos, (mean, std), prepared = dist.broadcast_object((sincos, given, prepared))
    data = replace(config.data, mean=list(mean), std=list(std), **prepared)
    return replace(config, model=replace(config.model, sincos=sincos), data=data)


def preparation(data: DataConfig, vision: Artifact | None) -> dict[str, Any]:
    """Return data.resize, interpolation and crop_pct; with auto, those of the parent artifact."""
    source = data if vision is None or data.resize != "auto" else data_config(vision)
    values = {name: getattr(source, name) for name in PREPARATION}
    usual = DataConfig()
    for name in PREPARATION:
        if getattr(data, name) != getattr(usual, name):  # given
            values[name] = getattr(data, name)
    return {**values, "resize": "crop"} if values["resize"] == "auto" else values


def normalisation(
    data: DataConfig, vision: Artifact | None, weights: ModelConfig | None
) -> Normalisation:
    """Return mean and std of a new run: as given, else of its parent or weights, else ImageNet's.

    Raises ConfigError if those given are not those of the weights of `model.pretrained`.
    """
    source, known = "", None
    if vision is not None:
        source, known = str(vision.path), data_config(vision).normalisation
    elif weights is not None and weights.pretrained:
        source = f"model.pretrained={weights.pretrained}"
        known = normalisation_of(weights)
        if known is None and data.mean is None:
            known = _usual(weights)
    mean, std = known if known is not None else IMAGENET
    if known is None or (_same(data.mean, mean) and _same(data.std, std)):
        return data.mean or mean, data.std or std
    told = f"data.mean={data.mean} and data.std={data.std} are not those of {source}"
    told = f"{told}, {mean} and {std}"
    if vision is None:
        raise ConfigError(f"{told}: leave data.mean and data.std out (null)")
    log.warning("%s", told)
    return data.mean or mean, data.std or std


def _same(given: list[float] | None, known: list[float]) -> bool:
    pairs = zip(given or known, known, strict=True)
    return all(abs(a - b) < SAME for a, b in pairs)


def _usual(model: ModelConfig) -> Normalisation:
    """Return the mean and std that released weights of this model were trained with."""
    known = of_release(model.name) or IMAGENET
    log.warning(
        "no file beside %s says its mean and std: it runs with mean %s and std %s, those of timm's "
        "weights of %s; set data.mean and data.std if it was trained with others",
        model.pretrained, *known, model.name,
    )  # fmt: skip
    return known
