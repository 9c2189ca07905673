"""Kinds of settings: the type of a dotted key in a config, and its name in error messages."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def kind_at(schema: Any, key: str) -> Any:
    """Return the type of a dotted key below a dataclass or a dict; None if there is no such key."""
    kind = schema
    for part in key.replace("[", ".").replace("]", "").split("."):
        kind = next((one for one in options(kind) if one is not type(None)), None)
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        elif get_origin(kind) is dict or (get_origin(kind) is list and part.isdigit()):
            kind = get_args(kind)[-1]
        else:
            return None
    return kind


def misplaced(schema: Any, values: Mapping[str, Any], prefix: str = "") -> str:
    """Return the first dotted key with a section for a list, or another value for a section; ""."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        kinds = [get_origin(one) or one for one in options(kind_at(schema, key))]
        section = dict in kinds or any(map(dataclasses.is_dataclass, kinds))
        if isinstance(value, Mapping):
            if list in kinds:
                return key
            if found := misplaced(schema, value, f"{key}."):
                return found
        elif section and not (isinstance(value, list) and list in kinds):
            return key
    return ""


def is_text(kind: Any) -> bool:
    """Return True for a text, or a choice of texts."""
    kinds = [one for one in options(kind) if one is not type(None)]
    return bool(kinds) and all(one is str or isinstance(one, str) for one in kinds)


def keys_of(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all settings of a dataclass."""
    for name, kind in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            yield from keys_of(kind, f"{prefix}{name}.")


def in_words(kind: Any) -> str:
    """Describe a type as what to write, such as "a whole number"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    told = []
    for one in options(kind):
        origin = get_origin(one) or one
        if origin is list:
            inside = get_args(one)[-1] if get_args(one) else int
            section = dataclasses.is_dataclass(inside)
            told.append(f"a list, such as {'[{KEY: VALUE}]' if section else '[1, 2]'}")
        elif origin is dict or dataclasses.is_dataclass(one):
            told.append("sections of keys, as KEY.NAME={...}")
        elif one is not type(None):
            told.append(words.get(one, str(one)))
    return " or ".join(dict.fromkeys(told)) or "a value"


def options(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union and the values of choices."""
    return tuple(
        option
        for one in members(kind)
        for option in (get_args(one) if get_origin(one) is Literal else (one,))
    )


def members(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
