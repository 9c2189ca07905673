"""Descriptions of the keys of a recipe: of its stages, its evaluation and the recipe itself."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stages import STAGES, stage_config
from xray.config import loading as cfg
from xray.config.explain import ROLES, Setting, one_line, settings_of
from xray.errors import ConfigError, nearest
from xray.evaluation.config import EvalConfig
from xray.recipes.recipe import OWN_KEYS, PrepareConfig

GROUPS = ("base", "model", "zero", "stage", "recipe")  # of shipped yaml files
RECIPE = "recipe"  # scope of the keys of the recipe itself


@dataclass(frozen=True)
class Explained:
    """A key, its description in each stage or section that has it, and the files that set it."""

    key: str
    scopes: Mapping[str, Setting]  # stage, eval, prepare or recipe -> description
    places: Mapping[str, Mapping[str, Any]]  # shipped yaml -> "" or a stage -> value

    def lines(self) -> Iterator[str]:
        """Yield the lines that `xray config KEY` prints."""
        first = next(iter(self.scopes.values()))
        yield first.key
        yield from _row("", first.meaning)
        yield from _row("type:", first.type)
        defaults: dict[str, list[str]] = {}
        for scope, own in self.scopes.items():
            defaults.setdefault(one_line(own.default), []).append(scope)
        for value, scopes in defaults.items():
            where = f" ({', '.join(scopes)})" if len(defaults) > 1 else ""
            yield from _row("default:", f"{value}{where}")
        if stages := [scope for scope in self.scopes if scope in STAGES]:
            yield from _row("stages:", ", ".join(stages))
            yield from _row(f"{first.role}:", ROLES[first.role])
        for number, (file, values) in enumerate(self.places.items()):
            told = [f"{name}: {one_line(v)}" if name else one_line(v) for name, v in values.items()]
            yield from _row("" if number else "set in:", f"{file}: {'; '.join(told)}")


def _row(label: str, text: str) -> list[str]:
    """Wrap a text at 80 columns, beside its label."""
    first = f"  {label:<10}" if label else f"  {'':10}"
    wrap = textwrap.TextWrapper(80, first, " " * 14, break_long_words=False, break_on_hyphens=False)
    return wrap.wrap(text)


def scopes() -> dict[str, list[Setting]]:
    """Return the settings of each stage, of the evaluation, and of the recipe itself."""
    found = {name: list(settings_of(stage_config(name))) for name in STAGES}
    found["eval"] = list(settings_of(EvalConfig, "eval."))
    found["prepare"] = list(settings_of(PrepareConfig, "prepare."))
    kinds = {"stages": list[str]}
    found[RECIPE] = [
        Setting(key, kinds.get(key, str), [] if key in kinds else "", meaning, "runtime")
        for key, meaning in OWN_KEYS.items()
        if key not in found
    ]
    return found


def explain_key(key: str) -> Explained | None:
    """Describe a key; None if there is none. A recipe's `clip.optim.base_lr` is optim.base_lr."""
    every = scopes()
    stage, _, rest = key.partition(".")
    for name in (key, rest if stage in STAGES else ""):
        found = {
            scope: own
            for scope, settings in every.items()
            for own in settings
            if name and own.matches(name)
        }
        if found:
            return Explained(name, found, dict(_places(name)))
    return None


def section_of(key: str) -> dict[str, Setting]:
    """Return the settings below a section such as `optim`, by key; {} if there is none.

    A recipe's `clip.optim` is optim.
    """
    every = [own for settings in scopes().values() for own in settings]
    stage, _, rest = key.partition(".")
    for name in (key, rest if stage in STAGES else ""):
        found = {own.key: own for own in reversed(every) if name and own.is_below(name)}
        if found:
            return dict(reversed(found.items()))
    return {}


def unknown_key(key: str) -> ConfigError:
    """Return the error for a name that is no key, with the nearest one."""
    keys = [own.key for settings in scopes().values() for own in settings]
    longer = [own for own in keys if own.startswith(key)]
    hint = nearest(key, longer or keys) or "; xray config clip --explain lists the keys of a stage"
    return ConfigError(f"unknown key {key!r}{hint}")


def _places(key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (shipped yaml, values) where a file sets a key: for all stages (""), or for one."""
    for group in GROUPS:
        for name in [""] if group == "base" else cfg.shipped(group):
            file = f"{group}/{name}" if name else group
            content = cfg.read_yaml(cfg.config_path(file))
            inside = {group: content} if group in cfg.PRESETS else content
            values = {"": _at(inside, key)}
            if group == RECIPE:
                values |= {stage: _at(inside, f"{stage}.{key}") for stage in STAGES}
            if values := {stage: value for stage, value in values.items() if value is not None}:
                yield f"configs/{file}.yaml", values


def _at(content: Any, key: str) -> Any:
    """Return the value at a dotted key of nested mappings; None if there is none."""
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return None
        content = content[part]
    return content
