"""Load a checked config from layers: shipped yaml, the user's yaml, then `key=value`."""

from __future__ import annotations

import functools
import importlib.util
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import MarkedYAMLError

from xray.config.kinds import in_words, is_text, keys_of, kind_at, misplaced, options
from xray.errors import ArtifactError, ConfigError, closest, nearest
from xray.files import nearest_path
from xray.urls import conceal_all

# Sections whose value may be the name of a shipped yaml file: `model=vit_b16`, `zero=2`.
PRESETS = ("model", "zero")
# Settings that belong to one model and are dropped if a later layer names another.
OF_THE_NAME = ("kwargs", "reduce_at", "keep_rates")
MOST_HINTS = 4  # keys that an error proposes
LENGTH = ("samples", "epochs")  # of section train: a later layer's replaces those of earlier ones

C = TypeVar("C")
Layer = Mapping[str, Any]
Kinds = Callable[[str], Any]  # dotted key -> its type, None if there is no such key


def config_path(name: str) -> Path:
    """Return the path of a shipped yaml such as `stage/mae`, also from an installed wheel."""
    spec = importlib.util.find_spec("configs")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / f"{name}.yaml"


def shipped(group: str) -> list[str]:
    """List the shipped yaml files of a group (`model`, `zero`, `recipe`, ...) by name."""
    return sorted(p.stem for p in config_path(f"{group}/x").parent.glob("*.yaml"))


def find_yaml(group: str, name: str) -> Path:
    """Return the path of a .yaml file, or of a shipped one by name; raises ConfigError."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.exists():
            near = nearest(path.stem, shipped(group)) or nearest_path(path)
            raise ConfigError(f"config file {path} does not exist{near}")
        return path
    if group == "recipe" and path.is_dir():
        raise ConfigError(
            f"{name} is a folder, not a recipe: xray init mine.yaml {shlex.quote(name)} writes a "
            "recipe for the data in it"
        )
    return _shipped_path(group, name, ", or give a .yaml file")


def _shipped_path(group: str, name: str, instead: str = "") -> Path:
    """Return the path of a shipped yaml; raises ConfigError that lists the others."""
    path = config_path(f"{group}/{name}")
    if not path.is_file():
        names = shipped(group)
        raise ConfigError(
            f"unknown {group} {name!r}: there are {', '.join(names)}{instead}{nearest(name, names)}"
        )
    return path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a yaml mapping; raises ConfigError if it is missing or not a mapping."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path} is not valid yaml: {error.problem}{line}") from error
    except Exception as error:  # e.g. a binary file
        raise ConfigError(f"{path} is not valid yaml: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    return {str(key): value for key, value in content.items()}


def stored_config(folder: Path) -> dict[str, Any]:
    """Read the config.yaml of a run; raises ArtifactError that names the runs below instead."""
    if (folder / "config.yaml").is_file():
        return read_yaml(folder / "config.yaml")
    if not folder.exists():
        raise ArtifactError(f"{folder} contains no run: it does not exist{nearest_path(folder)}")
    below = ", ".join(sorted(str(path.parent) for path in folder.glob("*/config.yaml")))
    inside = f"; give one of those inside: {below}" if below else ""
    raise ArtifactError(f"{folder} contains no run: it has no config.yaml{inside}")


def kinds_of(schema: type) -> Kinds:
    """Return the types of a config's keys."""
    return functools.partial(kind_at, schema)


def parse_overrides(items: Sequence[str], kinds: Kinds | None = None) -> dict[str, Any]:
    """Parse `["a.b=1", "a.c=x"]` to a nested dict; raises ConfigError for other forms.

    kinds: types of the keys. The value of a text key is taken as it is, that of another key as
    yaml. Without `kinds`, yaml decides which values are texts.
    """
    for item in items:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"{item!r} is not a setting: write KEY=VALUE")
    layers: list[Layer] = []
    for item in sorted(items, key=lambda item: item.split("=", 1)[0] not in PRESETS):
        try:
            key, value = item.split("=", 1)
            layers.append(_parse_override(key, value, kinds))
        except Exception as error:  # yaml and omegaconf have several parser errors
            raise ConfigError(f"{item!r} cannot be read: {_first_line(error)}") from error
    _check_lengths([item.split("=", 1)[0] for item in items])
    return merge(*layers)


def _check_lengths(keys: Sequence[str]) -> None:
    """Raise ConfigError for two keys that set the length of the same stage."""
    for key in keys:
        other = f"{key.removesuffix('.samples')}.epochs"
        if key.endswith("train.samples") and other in keys:
            raise ConfigError(f"{key} and {other} both set the length: give one of them")


def _parse_override(key: str, value: str, kinds: Kinds | None) -> dict[str, Any]:
    """Parse one override to a nested dict. The value is read as yaml; plain text keeps its form."""
    if value and kinds is not None and is_text(kind := kinds(key)):
        return _nested(key, _as_given(value, kind))
    parsed = OmegaConf.from_dotlist([f"{key}={value}"])
    found = OmegaConf.select(parsed, key)
    sentence = isinstance(found, DictConfig) and not value.lstrip().startswith("{")  # `query: `
    if sentence or (isinstance(found, str) and found == value.strip()):  # with its spaces
        OmegaConf.update(parsed, key, value, merge=False)
    return OmegaConf.to_container(parsed)  # type: ignore[return-value]


def _as_given(value: str, kind: Any) -> str | None:
    """Return the value of a text key: as given, without quotes around the whole of it."""
    if value == "null" and type(None) in get_args(kind):
        return None
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        with suppress(Exception):  # a quotation mark at each end that quotes no whole
            inner = OmegaConf.from_dotlist([f"key={value}"])["key"]
            return inner if isinstance(inner, str) else value
    return value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def merge(*layers: Layer) -> dict[str, Any]:
    """Merge nested mappings; later layers win, and lists replace.

    A section of PRESETS may be the name of a preset. A layer that names a model drops the settings
    in OF_THE_NAME of earlier layers, because they belong to the earlier model. A layer that sets a
    length of training drops that of earlier layers.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key in PRESETS and isinstance(value, str | int):
                value = read_yaml(_shipped_path(key, str(value)))
            if key in PRESETS and isinstance(value, Mapping) and "name" in value:
                kept = result.get(key, {})
                result[key] = {name: kept[name] for name in kept if name not in OF_THE_NAME}
            if key == "train" and _sets_length(value) and isinstance(result.get(key), Mapping):
                kept = result[key]
                result[key] = {name: kept[name] for name in kept if name not in LENGTH}
            if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
                result[key] = merge(result[key], value)
            else:
                result[key] = merge(value) if isinstance(value, Mapping) else value
    return result


def _sets_length(train: Any) -> bool:
    """Return True for a section with a length; samples: 0 is what a config without one shows."""
    given = train if isinstance(train, Mapping) else {}
    return bool(given.get("samples")) or given.get("epochs") is not None


def build(schema: type[C], *layers: Layer, section: str = "") -> C:
    """Merge layers and check them against a dataclass.

    section: prefix of the keys in error messages, with its dot. Raises ConfigError for unknown keys
    and wrong types.
    """
    merged = merge(*layers)
    hashable: Any = schema  # mypy does not see that a class is, unless its instances are
    try:
        typed = OmegaConf.merge(_structured(hashable), OmegaConf.create(merged))
        config: C = conceal_all(OmegaConf.to_object(typed))
        return config
    except ConfigKeyError as error:
        kind = error.object_type  # the dataclass that has no such field
        where = [item.name for item in fields(kind)] if is_dataclass(kind) else []
        raise unknown_key(f"{section}{error.full_key}", schema, where, merged) from error
    except TypeError as error:  # omegaconf's for a list and a section in each other's place
        key = misplaced(schema, merged)
        if not key:
            raise
        raise ConfigError(f"{section}{key}: give {in_words(kind_at(schema, key))}") from error
    except OmegaConfBaseException as error:
        key = error.full_key or misplaced(schema, merged)
        raise ConfigError(f"{section}{key}: {_meaning(error, schema, merged, key)}") from error


def unknown_key(key: str, schema: type, where: Sequence[str], values: Layer) -> ConfigError:
    """Return the error for a key that a config does not have, with those that may be meant.

    where: names in the section of the key. values: the config that has the key.
    """
    above, dot, last = key.rpartition(".")
    known, in_stage = [*keys_of(schema)], above == values.get("stage")
    if in_stage:  # in a recipe, the section of a stage has the sections of a run, too
        where = [*where, *(item.name for item in fields(cast(Any, schema)))]
    deeper = [own for own in known if own.endswith(f".{last}")]
    too_long = [own for own in known if key.endswith(f".{own}")]
    near = closest(last, where)
    candidates = (
        [] if dot else deeper,
        [f"{above}{dot}{name}" for name in ([near] if near else _with_part(last, where))],
        sorted(too_long, key=len)[-1:],
        [f"{above}.{own}" for own in deeper] if in_stage else [],
    )
    meant = next(filter(None, candidates), [])
    hint = f"there are {', '.join(sorted(where))}"
    if 0 < len(meant) <= MOST_HINTS:
        hint = f"did you mean {' or '.join(map(repr, meant))}?"
    return ConfigError(f"unknown key {key!r}; {hint}")


def _with_part(word: str, names: Sequence[str]) -> list[str]:
    """Return the names that have a word as a part, such as base_lr for lr."""
    return [name for name in names if word in name.split("_")]


@functools.cache
def _structured(schema: type) -> DictConfig:
    """Return a dataclass as omegaconf's config, which a merge copies."""
    config: DictConfig = OmegaConf.structured(schema)
    return config


def check_known(schema: type, values: Layer, prefix: str = "") -> None:
    """Raise ConfigError for the first key of nested values that a dataclass does not have."""
    for name, value in values.items():
        if not name.isidentifier() or kind_at(schema, f"{prefix}{name}") is not None:
            if isinstance(value, Mapping):
                check_known(schema, value, f"{prefix}{name}.")
            continue
        build(schema, _nested(f"{prefix}{name}", value))  # raises


def load_config(schema: type[C], stage: str, *layers: Layer) -> C:
    """Merge base.yaml, stage/STAGE.yaml and the layers into one checked dataclass.

    Raises ConfigError as `build` does, and for another stage.
    """
    for layer in layers:
        _check_stage(schema, stage, layer.get("stage", stage))
    shipped_layers = (read_yaml(config_path("base")), read_yaml(config_path(f"stage/{stage}")))
    return build(schema, *shipped_layers, *layers, {"stage": stage})


def _check_stage(schema: type, stage: str, given: Any) -> None:
    """Raise ConfigError for `stage=OTHER`, and for `stage.KEY`, meant for the stage's section."""
    if isinstance(given, Mapping):
        key = f"{stage}.{next(iter(given), '')}"
        hint = nearest(key, [name for name in keys_of(schema) if "." in name])
        raise ConfigError(
            f"unknown key 'stage.{next(iter(given), '')}'{hint or f': write {stage}.KEY=VALUE'}"
        )
    if given != stage:
        raise ConfigError(f"stage={given}: the stage to train is {stage}; leave stage= out")


def _meaning(error: OmegaConfBaseException, schema: type, merged: Layer, key: str) -> str:
    """Translate an omegaconf error for the person who wrote the value."""
    text, kind = _first_line(error), kind_at(schema, key)
    if "'None'" in text:
        return "give a value"
    if kind is None or isinstance(error, InterpolationResolutionError):
        return text
    value: Any = merged
    for part in key.replace("[", ".").replace("]", "").split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list):
            value = value[int(part)]
    hint = nearest(str(value), [one for one in options(kind) if isinstance(one, str)])
    return f"give {in_words(kind)}, not {value!r}{hint}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
