"""Help texts of the commands: plain text of at most 80 columns, the same with every Typer."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from typer.core import TyperCommand, TyperGroup

from xray.config.explain import settings_of, shown

C = TypeVar("C", bound=Callable[..., None])
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 80}
METAVARS: dict[type, str] = {int: "N", float: "X", Path: "PATH"}


def examples(*shown: tuple[str, str]) -> Callable[[C], C]:
    """Decorate a command so that its help shows examples: (command line, result) of each."""

    def mark(command: C) -> C:
        command.examples = shown  # type: ignore[attr-defined]
        return command

    return mark


class Command(TyperCommand):
    """A command whose help lists arguments, options, settings and examples."""

    def get_usage(self, ctx: Any) -> str:
        """Return the line of the usage, with the names that the help explains."""
        formatter = ctx.make_formatter()
        names = [name for name, _ in self._arguments(ctx)]
        formatter.write_usage(ctx.command_path, " ".join(["[OPTIONS]", *names]))
        return str(formatter.getvalue().rstrip("\n"))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        _write_head(self, ctx, formatter)
        for title, rows in (
            ("Arguments", list(self._arguments(ctx))),
            ("Options", list(_options(self, ctx))),
            ("Settings, KEY=VALUE with their defaults", list(self._settings())),
        ):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        shown = getattr(self.callback, "examples", ())
        if shown:
            formatter.write("\nExamples:\n")
        for line, result in shown:
            formatter.write(f"  {line}\n{textwrap.indent(textwrap.fill(result, 70), ' ' * 6)}\n")

    def _arguments(self, ctx: Any) -> Iterator[tuple[str, str]]:
        for param in self.get_params(ctx):
            if param.param_type_name == "argument":
                kind, info, _ = _declared(self, param.name)
                name = info.metavar or param.name.upper() + ("..." if _is_list(kind) else "")
                yield name, info.help or ""

    def _settings(self) -> Iterator[tuple[str, str]]:
        name, given = getattr(self.callback, "takes", ("", ()))
        if name:
            module, _, config = name.partition(":")
            for row in help_rows(getattr(importlib.import_module(module), config)):
                if row[0].split("=")[0] not in given:
                    yield row


def help_rows(config: type) -> Iterator[tuple[str, str]]:
    """Yield (`key=default`, its choices and its meaning) of each setting of a command."""
    for own in settings_of(config):
        choices = own.type if get_origin(own.kind) is Literal else ""
        yield f"{own.key}={shown(own.default)}", "; ".join(filter(None, (choices, own.meaning)))


class Group(TyperGroup):
    """A group whose help lists its commands, each with the first sentence of its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        _write_head(self, ctx, formatter)
        with formatter.section("Options"):
            formatter.write_dl(list(_options(self, ctx)))
        with formatter.section("Commands"):
            named = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
            formatter.write_dl([(name, _summary(command)) for name, command in named])


def _write_head(command: Any, ctx: Any, formatter: Any) -> None:
    formatter.write(f"{command.get_usage(ctx)}\n")
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_text(command.help or "")


def _summary(command: Any) -> str:
    """Return the first sentence of a command's help."""
    first = " ".join((command.help or "").split("\n\n")[0].split())
    return first.split(". ")[0].rstrip(".")


def _options(command: Any, ctx: Any) -> Iterator[tuple[str, str]]:
    for param in command.get_params(ctx):
        if param.param_type_name != "option":
            continue
        names = ", ".join(sorted([*param.opts, *param.secondary_opts], key=len))
        if "--help" in param.opts:
            yield names, "Show this message and exit"
            continue
        kind, info, default = _declared(command, param.name)
        parts = [info.help or "", _range(info)]
        if default not in (None, "", False, True):
            parts.append(f"[default: {default}]")
        metavar = info.metavar or METAVARS.get(kind, param.name.upper())
        yield names if kind is bool else f"{names} {metavar}", " ".join(filter(None, parts))


def _range(info: Any) -> str:
    """Return the range of a number as text."""
    if info.min is None:
        return ""
    return f"[{info.min:g} or more]" if info.max is None else f"[{info.min:g} to {info.max:g}]"


def _declared(command: Any, name: str) -> tuple[Any, Any, Any]:
    """Return (type, typer's description, default) of a parameter of a command's function."""
    function = inspect.unwrap(command.callback)
    kind, info = get_args(get_type_hints(function, include_extras=True)[name])
    default = inspect.signature(function).parameters[name].default
    return _plain(kind), info, None if default is inspect.Parameter.empty else default


def _plain(kind: Any) -> Any:
    """Return X of X | None and of list[X] | None, as METAVARS has it."""
    kinds = [item for item in get_args(kind) if item is not type(None)]
    return kinds[0] if len(kinds) == 1 and not _is_list(kind) else kind


def _is_list(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is list
