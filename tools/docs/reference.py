"""Reference pages of the manual, generated from dataclasses, commands, docstrings and recipes.

A page of docs/reference has a line `<!-- generated: NAME -->`, which the site replaces by the
result of PAGES[NAME].
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from stages import STAGES, stage_class
from xray.config.explain import Setting, one_line, settings_of, title_of
from xray.config.loading import config_path, shipped
from xray.recipes.settings import scopes

PLACEHOLDER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
# A page of the settings begins with these sections; the others follow in their order.
FIRST = ("", "data", "model", "text", "mae", "hashtag", "clip", "optim", "train", "zero", "debug")


def settings_page() -> str:
    """Describe every key of a recipe, of a stage and of an evaluation."""
    keys: dict[str, dict[str, Setting]] = {}
    for scope, settings in scopes().items():
        for own in settings:
            keys.setdefault(own.key, {})[scope] = own
    sections: dict[str, list[str]] = {name: [] for name in FIRST}
    titles = _titles()
    for key, by_scope in keys.items():
        parts = key.split(".")
        name = ".".join(parts[:2]) if parts[0] == "eval" and len(parts) > 2 else parts[0]
        name = "" if len(parts) == 1 else name
        sections.setdefault(name, []).append(_setting(by_scope))
    text = []
    for name, entries in sections.items():
        text += [f"## {name or 'Top level'}", titles.get(name, ""), *entries]
    return "\n\n".join(filter(None, text))


def _titles() -> dict[str, str]:
    """Return the first sentence about each section, from the docstring of its dataclass."""
    titles = {}
    for stage in STAGES:
        config = stage_class(stage).Config()
        for name, value in vars(config).items():
            if hasattr(value, "__dataclass_fields__") and name not in titles:
                titles[name] = title_of(type(value))
    return titles


def _setting(by_scope: dict[str, Setting]) -> str:
    first = next(iter(by_scope.values()))
    defaults: dict[str, list[str]] = {}
    for scope, own in by_scope.items():
        defaults.setdefault(one_line(own.default), []).append(scope)
    told = [
        f"`{value}`" + (f" ({', '.join(names)})" if len(defaults) > 1 else "")
        for value, names in defaults.items()
    ]
    notes = [first.type, f"default {', '.join(told)}"]
    stages = [scope for scope in by_scope if scope in STAGES]
    if stages:
        notes.append(first.role)
        notes += [f"stage {', '.join(stages)}"] if len(stages) < len(STAGES) else []
    return _definition(first.key, first.meaning, notes)


def _definition(term: str, meaning: str, notes: Iterable[str]) -> str:
    return f"`{term}`\n: {_escape(meaning)}\n  *{_escape(' · '.join(notes))}*"


def _escape(text: str) -> str:
    """Escape what Markdown would read as markup, outside of code spans."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_<>|\[\]{}$#])", r"\\\1", part)
        for part in parts
    )


# commands --------------------------------------------------------------------------------------


def commands_page() -> str:
    """Describe every command with its arguments, options and settings."""
    from xray.commands.main import COMMANDS, DATA, DEBUG, app

    functions = {**COMMANDS, **{f"data {k}": f for k, f in DATA.items()}}
    functions |= {f"debug {k}": f for k, f in DEBUG.items()}
    root: Any = typer.main.get_command(app)
    text = []
    for name, command in _leaves(root, ""):
        text.append(f"## xray {name}")
        text.append(_escape(inspect.cleandoc(command.help or "")))
        usage = " ".join(command.collect_usage_pieces(typer.Context(command)))
        text.append(f"```\nxray {name} {usage}\n```")
        text += [_parameter(own) for own in command.params]
        function: Any = functions.get(name)
        if hasattr(function, "takes"):
            where, given = function.takes
            module, _, config = where.partition(":")
            text.append("Settings, as `KEY=VALUE`:")
            for own in settings_of(getattr(importlib.import_module(module), config)):
                if own.key not in given:
                    notes = [own.type, f"default `{one_line(own.default)}`"]
                    text.append(_definition(own.key, own.meaning, notes))
    return "\n\n".join(text)


def _leaves(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _parameter(own: Any) -> str:
    names = ", ".join([*own.opts, *own.secondary_opts])
    if not own.opts[0].startswith("-"):
        names = own.metavar or own.name.upper()
    notes = ["required"] if own.required else []
    if own.default not in (None, "", False, ...) and not callable(own.default):
        notes.append(f"default `{own.default}`")
    meaning = own.help or ""
    return _definition(names, meaning, notes or ["optional"])


# Python ----------------------------------------------------------------------------------------


def python_page() -> str:
    """Describe the public Python API: signatures and docstrings."""
    import xray
    from xray import errors

    text = ["## xray.load", _signature("xray.load", xray.load), _docstring(xray.load)]
    text += ["## xray.Model", _docstring(xray.Model)]
    for name, own in vars(xray.Model).items():
        if name.startswith("_"):
            continue
        text.append(f"### Model.{name}")
        function = own.fget if isinstance(own, property) else own
        if not isinstance(own, property):
            text.append(_signature(name, function))
        text.append(_docstring(function))
    text += ["## xray.errors", "Every error that a user can cause is one of these classes:"]
    for name, own in vars(errors).items():
        if isinstance(own, type) and issubclass(own, errors.XrayError):
            text.append(f"`{name}`\n: {_escape(_joined(own.__doc__ or ''))}")
    return "\n\n".join(text)


def _signature(name: str, function: Callable[..., Any]) -> str:
    """Show a signature, one parameter a line; annotations are texts, as they were written."""
    signature = inspect.signature(function)
    lines, keywords = [], False
    for own in signature.parameters.values():
        if own.name == "self":
            continue
        if own.kind is own.KEYWORD_ONLY and not keywords:
            lines.append("*")
            keywords = True
        default = "" if own.default is own.empty else f" = {own.default!r}"
        lines.append(f"{own.name}: {own.annotation}{default}")
    inside = "".join(f"    {line},\n" for line in lines)
    return f"```python\n{name}(\n{inside}) -> {signature.return_annotation}\n```"


def _joined(text: str) -> str:
    return " ".join(text.split())


def _docstring(documented: Any) -> str:
    """Return a docstring as Markdown; its arguments become a list."""
    text = inspect.getdoc(documented) or ""
    lines: list[str] = []
    for line in text.splitlines():
        if line == "Args:":
            continue
        if re.match(r"    \w+: ", line):
            name, _, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {_escape(rest)}")
        elif line.startswith("     "):
            lines.append(f"  {_escape(line.strip())}")
        else:
            lines.append(_escape(line))
    return "\n".join(lines)


# recipes ---------------------------------------------------------------------------------------


def recipes_page() -> str:
    """Show the shipped recipes, models and ablations, each with the comment at its head."""
    text = []
    for group, title in (("recipe", "Recipes"), ("model", "Models"), ("ablation", "Ablations")):
        text.append(f"## {title}")
        for name in shipped(group):
            head, body = _head(config_path(f"{group}/{name}"))
            text += [f"### {name}", _escape(head), f"```yaml\n{body}\n```"]
    return "\n\n".join(filter(None, text))


def _head(path: Path) -> tuple[str, str]:
    """Split a yaml into its first comment, as a text, and the rest."""
    lines = path.read_text("utf-8").splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:count]), "\n".join(lines[count:])


PAGES: dict[str, Callable[[], str]] = {
    "settings": settings_page,
    "commands": commands_page,
    "python": python_page,
    "recipes": recipes_page,
}


def fill(text: str) -> str:
    """Replace the placeholders of a page by what they name."""
    return PLACEHOLDER.sub(lambda match: PAGES[match[1]](), text)
