"""Reading of an ablation's yaml file, with overrides of the command line.

    base: quickstart                       # any recipe
    seeds: [0, 1, 2]
    baseline: full                         # arm to compare the others with; default: the first
    common: {clip.train.samples: 9600}     # settings of all arms
    arms:                                  # settings that each arm changes, as keys of a recipe
      full: {}
      no_mae: {stages: [hashtag, text, clip]}
      no_mae_longer: {stages: [hashtag, text, clip], match_samples: full}
    axes: {clip.loss: [info_nce, sigmoid]} # more arms: every combination of these values
    metrics: [retrieval.text_to_image_R@10, clip.loss]   # SUITE.MEASURE, or STAGE.METRIC

An arm's settings override the command line, and the command line overrides `common`.
`match_samples: ARM` lengthens an arm's last stage so that all its stages together see as many
images and clips as all stages of ARM.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages import STAGES
from xray.config import loading as cfg
from xray.config import nearest
from xray.config.kinds import kind_at
from xray.errors import ConfigError
from xray.recipes.recipe import check_keys, kind_of_key

SETTINGS = ("common", "arms", "axes")  # sections that contain keys of a recipe
FIXED = ("base", "name", "out", "seed")  # keys of a recipe that the ablation sets for each run


@dataclass
class AblationConfig:
    """Keys of an ablation that are not keys of a recipe; docs/ablations.md describes them."""

    base: str = ""  # recipe that the arms change
    name: str = ""  # name of the ablation; "" = the name of the file
    out: str = ""  # folder of the runs and the report; "" = runs/ablate_NAME
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # each arm is trained with each
    baseline: str = ""  # arm that the others are compared with; "" = the first
    metrics: list[str] = field(default_factory=list)  # columns: SUITE.MEASURE or STAGE.METRIC
    jobs: int = 0  # concurrent runs; 0 = one per GPU, or one without GPUs

    def validate(self) -> None:
        """Raise ConfigError naming the key to change."""
        if not self.base:
            raise ConfigError("base is not set: set it to the recipe that the arms change")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds={self.seeds} must be different numbers of at least 0")
        if self.jobs < 0:
            raise ConfigError(f"jobs={self.jobs} must be 0 (one per GPU) or more")


@dataclass
class AblationFile:
    """Content of an ablation file, with overrides."""

    config: AblationConfig
    arms: dict[str, dict[str, Any]]  # settings of each arm, by dotted key
    common: list[dict[str, Any]]  # layers over the base recipe: `common`, then the command line's


def read_ablation(name: str, overrides: Sequence[str]) -> AblationFile:
    """Read a shipped ablation by name, or a yaml file, and apply `key=value` overrides.

    Overrides of keys that are not the ablation's change the recipe of every arm. Raises ConfigError
    for unknown keys, invalid values and an unknown baseline.
    """
    content = cfg.read_yaml(cfg.find_yaml("ablation", name))
    overrides_by_key = cfg.parse_overrides(overrides, _kind_of_key)
    config_keys = [item.name for item in dataclasses.fields(AblationConfig)]
    all_keys = [*config_keys, *SETTINGS]
    for key in content:
        if key not in all_keys:
            hint = nearest(key, all_keys) or f": use one of {', '.join(all_keys)}"
            raise ConfigError(f"{name}: unknown key {key!r}{hint}")
    layers = content, overrides_by_key
    config = _config(name, *({k: v for k, v in x.items() if k in config_keys} for x in layers))
    sections = {key: _flat(content.get(key), overrides_by_key.get(key), key) for key in SETTINGS}
    arms = {**_listed_arms(sections["arms"], name), **_axes_arms(sections["axes"])}
    if not arms:
        raise ConfigError(f"{name} has no arms: set arms or axes")
    config.baseline = config.baseline or next(iter(arms))
    if config.baseline not in arms:
        raise ConfigError(
            f"baseline={config.baseline} is not an arm{nearest(config.baseline, arms)}: "
            f"the arms are {', '.join(arms)}"
        )
    recipe_overrides = {k: v for k, v in overrides_by_key.items() if k not in all_keys}
    common = [nest(sections["common"]), recipe_overrides]
    for layer in common:
        check_keys(layer)
        check_fixed(layer, "" if layer is recipe_overrides else "common: ")
    return AblationFile(config, arms, common)


def _kind_of_key(key: str) -> Any:
    """Return the type of an ablation's dotted key, or of the recipe's that it changes."""
    first, _, rest = key.partition(".")
    if first in SETTINGS:
        setting = rest.partition(".")[2] if first == "arms" else rest
        return None if first == "axes" else kind_of_key(setting)
    return kind_at(AblationConfig, key) or kind_of_key(key)


def _config(name: str, content: dict[str, Any], overrides: dict[str, Any]) -> AblationConfig:
    config = cfg.build(AblationConfig, content, overrides)
    config.validate()
    stem = config.name or Path(name).stem
    config.name = f"{stem}_{Path(config.base).stem}" if "base" in overrides else stem
    config.out = os.path.expanduser(config.out or f"runs/ablate_{config.name}")
    return config


def check_fixed(layer: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError, prefixed by `where`, for keys that the ablation sets for each run."""
    keys = [key for key, _ in flatten(layer)]
    fixed = [*FIXED, *(f"{stage}.{key}" for stage in STAGES for key in ("out", "seed"))]
    for key in [key for key in fixed if key in keys]:
        reason = "use seeds=[...]" if key.endswith("seed") else "the ablation sets it for each run"
        raise ConfigError(f"{where}{key} cannot be set here: {reason}")


def _flat(content: Any, overrides: Any, section: str) -> dict[str, Any]:
    """Return a section's settings by dotted key; overrides replace those of the file."""
    for value in (content, overrides):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{section}={value} must be a section of keys")
    return dict(flatten(content or {})) | dict(flatten(overrides or {}))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as (dotted key, value); an empty section is a value."""
    for key, value in settings.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, path)
        else:
            yield path, value


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings by dotted key to a recipe's layer; presets (`model: vit_s16`) come first."""
    layers = []
    for key in sorted(settings, key=lambda key: key.split(".")[-1] not in cfg.PRESETS):
        value = settings[key]
        for part in reversed(key.split(".")):
            value = {part: value}
        layers.append(value)
    return cfg.merge(*layers)


def _listed_arms(settings: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Return the arms of the section `arms`, whose keys are ARM.KEY."""
    arms: dict[str, dict[str, Any]] = {}
    for path, value in settings.items():
        name, _, key = path.partition(".")
        if not re.fullmatch(r"[\w+-]+", name):
            raise ConfigError(f"{where}: arm name {name!r} must be of letters, digits, _, + and -")
        arm = arms.setdefault(name, {})
        if key:
            arm[key] = value
        elif value:
            what = "must be a section of keys ({} for the base recipe)"
            raise ConfigError(f"{where}: arm {name} {what}")
    return arms


def _axes_arms(axes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return one arm for every combination of the axes' values."""
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"axes.{key}={values} must be a list of values")
    last = [key.split(".")[-1] for key in axes]
    short = {key: t if last.count(t) == 1 else key for key, t in zip(axes, last, strict=True)}
    arms: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()) if axes else ():
        settings = dict(zip(axes, values, strict=True))
        name = ",".join(f"{short[key]}={_word(value)}" for key, value in settings.items())
        if name in arms:
            raise ConfigError(f"axes give arm {name} twice: remove the repeated value")
        arms[name] = settings
    return arms


def _word(value: Any) -> str:
    """Format a value for an arm's name, which is also a folder name."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")
