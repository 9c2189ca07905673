"""Recipes: the enabled stages in order, each starting from an earlier one, and an evaluation.

A recipe is a yaml: shared sections for all stages, a section per stage, and `eval`. A stage's
section takes the run's sections (optim, train, ...) and the stage's own options side by side:

    base: quickstart                # start from another recipe
    stages: [mae, hashtag, text, clip]
    data: {...}                     # shared
    clip: {embed_dim: 128, optim: {base_lr: 1e-3}}
    eval: {retrieval: {shards: heldout}}
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages import STAGES, check_stage, load_settings, stage_class, stage_config
from xray.artifacts.offers import slot_of
from xray.config import RunConfig
from xray.config import loading as cfg
from xray.config.kinds import kind_at
from xray.config.loading import PRESETS
from xray.config.model import LlmConfig
from xray.errors import ConfigError
from xray.evaluation.config import EvalConfig

# Keys of the recipe itself and their meanings.
OWN_KEYS = {
    "base": "recipe to start from: a shipped one by name, or a yaml file",
    "name": 'title of the report; "" = the name of the file',
    "out": 'folder of the runs and the report; "" = runs/NAME',
    "stages": "stages to run, in the order mae, hashtag, text, clip; [] = all",
    "prepare": "section: data and a language model that the recipe makes before its first stage",
    "eval": "section: data sets to evaluate on after the last stage",
}
SHARED = ("seed", "license", "model", "data", "optim", "train", "zero")


@dataclass
class PrepareConfig:
    """Data and language model that a recipe makes once, before its first stage."""

    demo: dict[str, Any] | None = None  # sizes of the data set generated at data.root
    llm: LlmConfig | None = None  # a small language model to make, with these sizes


@dataclass
class Recipe:
    """Resolved recipe: the stages' configs in order, and the evaluation."""

    name: str
    out: Path
    runs: list[RunConfig] = field(default_factory=list)  # validated config of each enabled stage
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    root: str = ""
    workers: int = 0
    notes: list[str] = field(default_factory=list)  # on settings that do nothing


def load_recipe(name: str, overrides: Sequence[str] = (), partly: bool = False) -> Recipe:
    """Load a shipped recipe by name, or a yaml file, with `key=value` overrides on top.

    partly: a key that is left to the user and is not set has its name as its value: <data.root>.
    Raises ConfigError for unknown keys and stages, and for settings that cannot work together.
    """
    command_line = cfg.parse_overrides(overrides, kind_of_key)
    for key in SHARED:  # a wrong key is named before the one that is then missing
        cfg.check_known(RunConfig, {key: command_line[key]} if key in command_line else {})
    layers = [*recipe_layers(name, command_line.pop("base", None)), command_line]
    recipe = resolve_recipe([*layers, _names_of_unset(layers)] if partly else layers)
    recipe.notes = [*_unread_text(command_line, layers, [run.stage for run in recipe.runs])]
    return recipe


def _unread_text(
    command_line: Mapping[str, Any], layers: Sequence[Any], stages: Sequence[str]
) -> Iterator[str]:
    """Yield a note on each key of the text stage that is typed, and read by no stage of a recipe.

    In a recipe without that stage, `text.KEY` does nothing, unless another key refers to it.
    """
    if "clip" not in stages or "text" in stages:
        return
    for name, value in (command_line.get("text") or {}).items():
        referred = f"${{text.{name}}}" in str(layers)
        if not referred and kind_at(stage_config("clip"), f"text.{name}") is not None:
            yield (
                f"text.{name}={value} does nothing: it is for the text stage, which is not in "
                f"stages; for the clip stage, set clip.text.{name}"
            )


def _names_of_unset(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a layer in which each key that is still `???` has its name in angle brackets."""
    whole = OmegaConf.create(cfg.merge(*layers))
    with _resolving():
        missing = OmegaConf.missing_keys(whole)
    return cfg.parse_overrides([f"{key}=<{key}>" for key in missing if not _refers(whole, key)])


def _refers(whole: DictConfig, key: str) -> bool:
    """Return True if a key's value is a reference to another key."""
    section, _, name = key.rpartition(".")
    return OmegaConf.is_interpolation(OmegaConf.select(whole, section), name)


def load_stage(name: str, overrides: Sequence[str]) -> RunConfig:
    """Load the validated config of one stage, without a recipe."""
    schema = stage_config(name)
    config = load_settings(name, cfg.parse_overrides(overrides, cfg.kinds_of(schema)))
    config.validate()
    return config


def resolve_recipe(layers: Sequence[dict[str, Any]]) -> Recipe:
    """Resolve a recipe from layers; a later layer overrides every section of those before it.

    Raises ConfigError as load_recipe does.
    """
    return link(read_recipe(layers))


def read_recipe(layers: Sequence[dict[str, Any]]) -> Recipe:
    """Check a recipe without importing its stages: as resolve_recipe, before `link`."""
    for layer in layers:
        check_keys(layer)
    merged = _resolve_whole(cfg.merge(*layers))
    stages = merged.get("stages") or list(STAGES)
    if not isinstance(stages, list):
        raise ConfigError(f"stages={stages} must be a list such as [mae,clip]")
    for stage in stages:
        check_stage(str(stage))
    recipe = Recipe(
        name=str(merged["name"]),
        out=Path(os.path.expanduser(str(merged["out"]))),
        prepare=cfg.build(PrepareConfig, merged.get("prepare") or {}, section="prepare."),
        eval=cfg.build(EvalConfig, merged.get("eval") or {}, section="eval."),
    )
    recipe.eval.validate()
    ordered = [stage for stage in STAGES if stage in stages]
    sections = [_resolve_in(layer, merged) for layer in layers]
    for stage in ordered:
        recipe.runs.append(_stage_config(stage, sections, recipe.out))
    shared = recipe.runs[0].data
    recipe.root, recipe.workers = shared.root, shared.workers
    return recipe


def stage_from_recipe(
    stage: str, name: str, overrides: Sequence[str]
) -> tuple[dict[str, Any], Recipe]:
    """Return a recipe's settings for one stage as a config layer, and the recipe to prepare.

    Only the overrides of section data are used, because paths depend on them, and those of keys
    that the recipe leaves to the user.
    """
    layers = recipe_layers(name, None)
    for layer in layers:
        check_keys(layer)
    left = OmegaConf.missing_keys(OmegaConf.create(cfg.merge(*layers)))
    used = [item for item in overrides if item.startswith("data.") or item.split("=")[0] in left]
    own = {**cfg.parse_overrides(used, kind_of_key), "stages": [stage]}
    merged = _resolve_whole(cfg.merge(*layers, own))
    parts = [part for layer in layers for part in _sections(stage, _resolve_in(layer, merged))]
    return cfg.merge(*parts), load_recipe(name, [f"stages=[{stage}]", *used])


def recipe_layers(name: str, base: str | None, above: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Read a recipe's yaml and those it is based on, base first; `base` replaces the one it
    names."""
    if name in above:
        raise ConfigError(f"recipe {name} is based on itself: {' -> '.join([*above, name])}")
    path = cfg.find_yaml("recipe", name)
    content = cfg.read_yaml(path)
    under = base or content.pop("base", None)
    content.pop("base", None)
    content.setdefault("name", f"{path.stem}_{Path(base).stem}" if base else path.stem)
    content.setdefault("out", f"runs/{content['name']}")
    return [*(recipe_layers(str(under), None, (*above, name)) if under else []), content]


def kind_of_key(key: str) -> Any:
    """Return the type of a recipe's dotted key; None if there is no such key."""
    first, _, rest = key.partition(".")
    if first in STAGES:  # its own options and the run's sections, side by side
        schema = stage_config(first)
        return kind_at(schema, rest) or kind_at(schema, key)
    sections = {"prepare": PrepareConfig, "eval": EvalConfig}
    if first in sections:
        return kind_at(sections[first], rest)
    return str if key in ("base", "name", "out") else kind_at(RunConfig, key)


def check_keys(layer: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that is not part of a recipe."""
    valid = [*OWN_KEYS, *SHARED, *STAGES]
    for key, value in layer.items():
        section = key in STAGES or key in ("prepare", "eval")
        if section and not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value} must be a section of keys: write {key}.KEY=VALUE")
        if key not in valid:
            raise cfg.unknown_key(key, RunConfig, valid, {})


def _resolve(content: Any) -> dict[str, Any]:
    with _resolving():
        return OmegaConf.to_container(OmegaConf.create(content), resolve=True)  # type: ignore


@contextmanager
def _resolving() -> Iterator[None]:
    """Raise ConfigError that names the key whose value cannot be resolved."""
    try:
        yield
    except OmegaConfBaseException as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key or 'the recipe'} cannot be resolved: {cause}"
        ) from error


def _resolve_whole(content: dict[str, Any]) -> dict[str, Any]:
    """Resolve a recipe's values; raises ConfigError for one that is still `???`, unless only stages
    that are left out read it: it becomes "".
    """
    whole = OmegaConf.create(content)
    with _resolving():  # of a reference to another missing key, that one is named
        missing = sorted(OmegaConf.missing_keys(whole), key=lambda key: (_refers(whole, key), key))
    stages = content.get("stages")
    unused = {*STAGES} - {*stages} if isinstance(stages, list) and stages else set[str]()
    if any(key.partition(".")[0] not in unused for key in missing):
        raise ConfigError(f"{missing[0]} is not set: give {missing[0]}=...")
    for key in missing:
        OmegaConf.update(whole, key, "")
    return _resolve(whole)


def _resolve_in(layer: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """Resolve one layer's values; interpolations refer to the whole recipe."""
    if not _interpolates(layer):  # most layers: to resolve the whole recipe for each is slow
        return layer
    return _resolve({**merged, "this layer": layer})["this layer"]


def _interpolates(value: Any) -> bool:
    """Return True if a value contains an interpolation, `${KEY}`, or an escaped one."""
    if isinstance(value, str):
        return "${" in value
    if isinstance(value, Mapping):
        return any(map(_interpolates, value.values()))
    return isinstance(value, list | tuple) and any(map(_interpolates, value))


def _sections(stage: str, layer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a layer into its shared part and its parts for a stage, as layers of the stage's
    config."""
    schema = stage_config(stage)
    names = {item.name for item in dataclasses.fields(schema)}
    shared = {key: layer[key] for key in SHARED if key in layer}
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in (layer.get(stage) or {}).items():
        nested = key in names and (key != stage or isinstance(value, Mapping))
        (own if nested or key in PRESETS else options)[key] = value
    return [shared, own, {stage: options} if options else {}]


def _stage_config(stage: str, layers: Sequence[Mapping[str, Any]], out: Path) -> RunConfig:
    parts = [part for layer in layers for part in _sections(stage, layer)]
    config = load_settings(stage, *parts)
    config.out = config.out or str(out / stage)
    config.validate()
    return config


def link(recipe: Recipe) -> Recipe:
    """Let each stage start from the last enabled stages whose artifacts it accepts."""
    last: dict[str, RunConfig] = {}
    for config in recipe.runs:
        kind = stage_class(config.stage)
        for slot in ("vision", "text"):
            parent = last.get(slot)
            if parent is not None and stage_class(parent.stage).offers & kind.accepts:
                config.init_from = [*config.init_from, str(Path(parent.out) / "artifact")]
        last[slot_of(kind.offers)] = config
    return recipe
