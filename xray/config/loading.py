"""Yaml layers to a checked config: shipped files <- files given <- `key=value`, strict."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError

from xray.config import nearest
from xray.errors import ConfigError

# Sections whose value may be the name of a shipped yaml: `model=vit_b16`, `zero=2`.
PRESETS = ("model", "zero")
OF_THE_NAME = ("kwargs", "reduce_at", "keep_rates")  # what only the model they were given for has

C = TypeVar("C")
Layer = Mapping[str, Any]


def config_path(name: str) -> Path:
    """A shipped yaml such as `stage/mae`, from a checkout or an installed wheel."""
    spec = importlib.util.find_spec("configs")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / f"{name}.yaml"


def shipped(group: str) -> list[str]:
    """Names of the shipped yaml files of a group (`model`, `zero`, `recipe`, ...)."""
    return sorted(p.stem for p in config_path(f"{group}/x").parent.glob("*.yaml"))


def find_yaml(group: str, name: str) -> Path:
    """A .yaml file given, or the shipped one of a group by name; raises ConfigError for neither."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    path = config_path(f"{group}/{name}")
    if not path.is_file():
        names = shipped(group)
        raise ConfigError(
            f"unknown {group} {name!r}: there are {', '.join(names)}, or give a .yaml file"
            f"{nearest(name, names)}"
        )
    return path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a yaml mapping; raises ConfigError when it is missing or is no mapping."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path} is not valid yaml: {error.problem}{line}") from error
    except Exception as error:  # of bytes that are no text, for one
        raise ConfigError(f"{path} is not valid yaml: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    return {str(key): value for key, value in content.items()}


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "a.c=x"]` -> nested dict; raises ConfigError for anything else."""
    for item in items:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"{item!r} is not an override: write key=value")
    layers: list[Layer] = []
    for item in sorted(items, key=lambda item: item.split("=", 1)[0] not in PRESETS):
        try:
            layers.append(_parse_override(*item.split("=", 1)))
        except Exception as error:  # yaml and omegaconf have several parser errors
            raise ConfigError(f"{item!r} cannot be read: {_first_line(error)}") from error
    return merge(*layers)


def _parse_override(key: str, value: str) -> dict[str, Any]:
    """One override as a nested dict; a value is read as yaml, but a text is taken as it stands."""
    parsed = OmegaConf.from_dotlist([f"{key}={value}"])
    found = OmegaConf.select(parsed, key)
    sentence = isinstance(found, DictConfig) and not value.lstrip().startswith("{")  # `query: `
    if sentence or (isinstance(found, str) and found == value.strip()):  # with its spaces
        OmegaConf.update(parsed, key, value, merge=False)
    return OmegaConf.to_container(parsed)  # type: ignore[return-value]


def load_preset(group: str, name: str) -> dict[str, Any]:
    """The section that `configs/GROUP/NAME.yaml` holds."""
    path = config_path(f"{group}/{name}")
    if not path.is_file():
        names = shipped(group)
        raise ConfigError(
            f"unknown {group} {name!r}: there are {', '.join(names)}{nearest(name, names)}"
        )
    return read_yaml(path)


def merge(*layers: Layer) -> dict[str, Any]:
    """Merge nested mappings, later ones winning; lists replace.

    A section of PRESETS may be a preset's name. Naming a model drops what an earlier layer gave
    as its `kwargs` and reducing blocks: they belong to the name.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key in PRESETS and isinstance(value, str | int):
                value = load_preset(key, str(value))
            if key in PRESETS and isinstance(value, Mapping) and "name" in value:
                kept = result.get(key, {})
                result[key] = {name: kept[name] for name in kept if name not in OF_THE_NAME}
            if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
                result[key] = merge(result[key], value)
            else:
                result[key] = merge(value) if isinstance(value, Mapping) else value
    return result


def build(schema: type[C], *layers: Layer, section: str = "") -> C:
    """Check layers against a dataclass; raises ConfigError for unknown keys and wrong types.

    section: what the keys stand below, with its dot, to a reader of the error.
    """
    merged = merge(*layers)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(merged))
        return OmegaConf.to_object(typed)  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = f"{section}{error.full_key}"
        kind = error.object_type  # the dataclass that has no such field
        where = [item.name for item in fields(kind)] if is_dataclass(kind) else []
        hint = nearest(key.split(".")[-1], where)
        raise ConfigError(f"unknown key {key!r}{hint or f'; there are {sorted(where)}'}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{section}{error.full_key}: {_meaning(error)}") from error


def load_config(schema: type[C], stage: str, *layers: Layer) -> C:
    """base.yaml <- stage/STAGE.yaml <- layers, as one checked dataclass."""
    shipped_layers = (read_yaml(config_path("base")), read_yaml(config_path(f"stage/{stage}")))
    return build(schema, *shipped_layers, *layers, {"stage": stage})


def _meaning(error: OmegaConfBaseException) -> str:
    """What omegaconf found, in words for who wrote the value."""
    text = _first_line(error)
    if "is not a ListConfig" in text:
        return "give a list, such as [1, 2]"
    if "is not a subclass of" in text:
        return "give sections of keys, as KEY.NAME={...}"
    return "give a value" if "'None'" in text else text


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
