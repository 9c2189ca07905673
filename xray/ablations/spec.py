"""The yaml of an ablation and what the command line changes of it.

    base: quickstart                       # any recipe
    seeds: [0, 1, 2]
    baseline: full                         # the arm that others are compared with [the first]
    common: {clip.train.samples: 9600}     # settings of all arms
    arms:                                  # what an arm changes, as keys of a recipe
      full: {}
      no_mae: {stages: [hashtag, text, clip]}
      no_mae_longer: {stages: [hashtag, text, clip], match_samples: full}
    axes: {clip.loss: [info_nce, sigmoid]} # further arms: the product of these values
    metrics: [retrieval.text_to_image_R@10, clip.loss]   # SUITE.MEASURE, or STAGE.METRIC

An arm's settings win over the command line, which wins over `common`. `match_samples: ARM`
lengthens an arm's last stage until it sees as many pictures and clips as ARM over all its stages.
Every run of a seed has that seed, and so the same samples in the same order wherever its data
section is the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages import STAGES
from xray.config import loading as cfg
from xray.config import nearest
from xray.errors import ConfigError
from xray.recipes.recipe import check_keys

SETTINGS = ("common", "arms", "axes")  # sections of a recipe's keys
OWN = ("base", "name", "out", "seed")  # of a run: an arm may not set them


@dataclass
class AblationConfig:
    """An ablation's own keys."""

    base: str = ""
    name: str = ""
    out: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baseline: str = ""
    metrics: list[str] = field(default_factory=list)
    jobs: int = 0  # runs at a time; 0 = one per GPU, one without

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if not self.base:
            raise ConfigError("base is not set: name the recipe that the arms change")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds={self.seeds} must be different numbers, none below 0")
        if self.jobs < 0:
            raise ConfigError(f"jobs={self.jobs} must be 0 (one per GPU) or more")


@dataclass
class AblationFile:
    """What an ablation asks for."""

    config: AblationConfig
    arms: dict[str, dict[str, Any]]  # settings by dotted key
    common: list[dict[str, Any]]  # layers over the base recipe: the file's, the command line's


def read_ablation(name: str, overrides: Sequence[str]) -> AblationFile:
    """A shipped ablation by name, or a yaml file, with `key=value` on top.

    A key that is not the ablation's is set in the recipe of every arm. Raises ConfigError.
    """
    content = cfg.read_yaml(cfg.find_yaml("ablation", name))
    given = cfg.parse_overrides(overrides)
    known = [item.name for item in dataclasses.fields(AblationConfig)]
    for key in content:
        if key not in (*known, *SETTINGS):
            hint = nearest(key, [*known, *SETTINGS]) or f": there are {[*known, *SETTINGS]}"
            raise ConfigError(f"{name}: unknown key {key!r}{hint}")
    over = {key: value for key, value in given.items() if key not in (*known, *SETTINGS)}
    config = _config(name, *({k: v for k, v in x.items() if k in known} for x in (content, given)))
    sections = {key: _flat(content.get(key), given.get(key), key) for key in SETTINGS}
    arms = {**_named(sections["arms"], name), **_grid(sections["axes"])}
    if not arms:
        raise ConfigError(f"{name} has no arms: give arms, or axes")
    config.baseline = config.baseline or next(iter(arms))
    if config.baseline not in arms:
        raise ConfigError(
            f"baseline={config.baseline} is no arm{nearest(config.baseline, arms)}: "
            f"there are {', '.join(arms)}"
        )
    common = [nest(sections["common"]), over]
    for layer in common:
        check_keys(layer)
        check_own(layer, "" if layer is over else "common: ")
    return AblationFile(config, arms, common)


def _config(name: str, content: dict[str, Any], given: dict[str, Any]) -> AblationConfig:
    config = cfg.build(AblationConfig, content, given)
    config.validate()
    stem = config.name or Path(name).stem
    config.name = f"{stem}_{Path(config.base).stem}" if "base" in given else stem
    config.out = config.out or f"runs/ablate_{config.name}"
    return config


def check_own(layer: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for keys of a run that the ablation gives it."""
    keys = [key for key, _ in flatten(layer)]
    fixed = [*OWN, *(f"{stage}.{key}" for stage in STAGES for key in ("out", "seed"))]
    for key in [key for key in fixed if key in keys]:
        rest = "use seeds=[...]" if key.endswith("seed") else "every run has its own"
        raise ConfigError(f"{where}{key} cannot be set here: {rest}")


def _flat(own: Any, given: Any, section: str) -> dict[str, Any]:
    """A section's settings by dotted key, those of the command line over the file's."""
    for value in (own, given):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{section}={value} must be a section of keys")
    return dict(flatten(own or {})) | dict(flatten(given or {}))


def flatten(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted key, value); an empty section is a value."""
    for key, value in settings.items():
        path = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, path)
        else:
            yield path, value


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key as a recipe's layer; presets (`model: vit_s16`) come first."""
    layers = []
    for key in sorted(settings, key=lambda key: key.split(".")[-1] not in cfg.PRESETS):
        value = settings[key]
        for part in reversed(key.split(".")):
            value = {part: value}
        layers.append(value)
    return cfg.merge(*layers)


def _named(settings: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The arms that are named, of keys ARM.KEY."""
    arms: dict[str, dict[str, Any]] = {}
    for path, value in settings.items():
        name, _, key = path.partition(".")
        if not re.fullmatch(r"[\w+-]+", name):
            raise ConfigError(f"{where}: an arm is named by letters, digits, _, + and -: {name!r}")
        arm = arms.setdefault(name, {})
        if key:
            arm[key] = value
        elif value:
            raise ConfigError(f"{where}: arm {name} must be a section of keys, {{}} for the base")
    return arms


def _grid(axes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """An arm for every combination of the axes' values."""
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"axes.{key}={values} must be a list of values")
    last = [key.split(".")[-1] for key in axes]
    short = {
        key: tail if last.count(tail) == 1 else key for key, tail in zip(axes, last, strict=True)
    }
    arms: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()) if axes else ():
        settings = dict(zip(axes, values, strict=True))
        parts = [f"{short[key]}={_word(value)}" for key, value in settings.items()]
        name = ",".join(parts)
        if name in arms:
            raise ConfigError(f"axes give arm {name} twice: leave out the second of its values")
        arms[name] = settings
    return arms


def _word(value: Any) -> str:
    """A value as part of an arm's name, which is a folder's too."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")
