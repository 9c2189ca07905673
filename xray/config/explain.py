"""Descriptions of settings: the type, default, meaning and role of each key of a config dataclass.

A meaning is the comment beside or above a field, so that it is written in one place.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from xray.config.kinds import members

Role = Literal["identity", "runtime", "added"]
ROLES: dict[Role, str] = {
    "identity": "changes the result; a resumed run must have the same value",
    "runtime": "does not change the result; may differ when a run is resumed",
    "added": "as identity; runs made before the key existed have the default, unless stated",
}
NAME, PLACE = "NAME", "N"  # parts of a key that stand for any name, and for a position in a list
TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "schedule"}


@dataclass(frozen=True)
class Setting:
    """A key of a config and its description."""

    key: str
    kind: Any  # type hint
    default: Any
    meaning: str
    role: Role

    @property
    def type(self) -> str:
        """Type in words, or the choices."""
        return type_in_words(self.kind)

    def matches(self, key: str) -> bool:
        """Check if a key as a user writes it names this setting: NAME and N stand for any part."""
        return self.key.count(".") == _parts_of(key).count(".") and self.is_below(key)

    def is_below(self, key: str) -> bool:
        """Check if a key as a user writes it names this setting or a section that it is in."""
        own, given = self.key.split("."), _parts_of(key).split(".")
        return len(own) >= len(given) and all(
            a in (b, NAME) or (a == PLACE and b.isdigit()) for a, b in zip(own, given, strict=False)
        )


def _parts_of(key: str) -> str:
    """Write a position in a list, `blocks[0]`, as a part of a dotted key."""
    return key.replace("[", ".").replace("]", "")


def settings_of(config: type, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a dataclass and of the dataclasses in its fields, in their order.

    Dataclasses in a dict or a list have keys such as `data.sources.NAME.shards`.
    """
    yield from _settings(config(), prefix, "identity")


def _settings(defaults: Any, prefix: str, role: Role) -> Iterator[Setting]:
    kinds, comments = get_type_hints(type(defaults)), comments_of(type(defaults))
    for item in dataclasses.fields(defaults):
        own, key, value = (
            _role(item.metadata, role),
            prefix + item.name,
            getattr(defaults, item.name),
        )
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{key}.", own)
            continue
        part, inside = _parts(kinds[item.name])
        meaning = comments.get(item.name) or (title_of(inside) if inside else "")
        yield Setting(key, kinds[item.name], value, meaning, own)
        if inside:
            yield from _settings(inside(), f"{key}.{part}", own)


def _role(metadata: Mapping[str, Any], above: Role) -> Role:
    if above == "runtime" or "runtime" in metadata:
        return "runtime"
    return "added" if "added" in metadata else above


def _parts(kind: Any) -> tuple[str, type | None]:
    """Return the part of a key, and the dataclass, in a dict, a list or an optional; else None."""
    for one in members(kind):
        if dataclasses.is_dataclass(one):
            return "", one  # type: ignore[return-value]
        if get_origin(one) in (dict, list) and dataclasses.is_dataclass(get_args(one)[-1]):
            return (f"{NAME}." if get_origin(one) is dict else f"{PLACE}."), get_args(one)[-1]
    return "", None


def title_of(config: type) -> str:
    """Return the first paragraph of a dataclass's docstring, as one line."""
    return " ".join((config.__doc__ or "").split("\n\n")[0].split())


def comments_of(config: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass and of its base classes."""
    comments: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        comments |= _comments(owner)
    return comments


@functools.cache  # reading and parsing the source takes milliseconds, and configs share sections
def _comments(config: type) -> dict[str, str]:
    """Return the comment of each field of a class: the lines above it, and those beside it."""
    source = textwrap.dedent(inspect.getsource(config))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    lines = source.splitlines()
    texts = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            numbers = range(first, (node.end_lineno or node.lineno) + 1)
            found = [comments[n].string.lstrip("# ") for n in numbers if n in comments]
            texts[node.target.id] = " ".join(found)
    return texts


def type_in_words(kind: Any) -> str:
    """Describe a type hint for a reader: `list of numbers`, `a | b`."""
    told = []
    for one in members(kind):
        origin, args = get_origin(one), get_args(one)
        if origin is Literal:
            told += [_shown(choice) for choice in args]
        elif origin is list:
            told.append(f"list of {_plural(args[0])}")
        elif origin is dict:
            told.append(f"NAME: {TYPES.get(args[1], 'section')}" if args[1] is not Any else "keys")
        elif one is type(None):
            told.append("null")
        else:
            told.append(TYPES.get(one, "section"))
    return " | ".join(told)


def _plural(kind: Any) -> str:
    return "lists" if get_origin(kind) is list else f"{TYPES.get(kind, 'section')}s"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, str):
        return f"'{value}'" if " " in value else value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


# a commented yaml ------------------------------------------------------------------------------

WIDTH = 88  # of comments
NO_WRAP = 10_000


def commented(name: str, config: Any) -> Iterator[str]:
    """Yield the lines of a config as yaml, with a comment on every key."""
    yield f"# {title_of(type(config))}"
    yield f"{name}:"
    yield from _lines(config, "", {own.key: own for own in settings_of(type(config))}, "  ")


def _lines(
    section: Any, prefix: str, settings: Mapping[str, Setting], indent: str
) -> Iterator[str]:
    note = f"{indent}# "
    for item in dataclasses.fields(section):
        value, own = getattr(section, item.name), settings.get(f"{prefix}{item.name}")
        if own is None:
            yield f"{note}{title_of(type(value))}"
            yield f"{indent}{item.name}:"
            yield from _lines(value, f"{prefix}{item.name}.", settings, f"{indent}  ")
        else:
            yield from textwrap.wrap(
                own.meaning, WIDTH, initial_indent=note, subsequent_indent=note
            )
            notes = [own.type]
            if value != own.default:
                notes.append(f"default {one_line(own.default)}")
            if own.role != "identity":
                notes.append(own.role)
            yield f"{indent}{item.name}: {one_line(value)}  # {'; '.join(notes)}"


def one_line(value: Any) -> str:
    """Return a value as yaml of one line."""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=NO_WRAP, sort_keys=False)
    return text.removesuffix("\n").removesuffix("...").rstrip()


def _plain(value: Any) -> Any:
    """Return a value with its dataclasses as dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value
