"""What a config is, in plain containers: hashed, and compared with another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain nested containers."""
    return dataclasses.asdict(config)


def identity(config: Any) -> dict[str, Any]:
    """The config without its runtime fields."""
    result = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.metadata.get("runtime"):
            continue
        result[item.name] = _identity_of(value)
    return result


def _identity_of(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return identity(value)
    if isinstance(value, dict):
        return {key: _identity_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_identity_of(item) for item in value]
    return value


def config_hash(config: Any) -> str:
    """sha256 of the identity fields."""
    return hash_json(identity(config))


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def filled(values: Any, defaults: Any) -> Any:
    """Nested containers with what they lack taken from defaults: for records of older versions."""
    if not (isinstance(values, Mapping) and isinstance(defaults, Mapping)):
        return values
    own = {key: filled(value, defaults.get(key)) for key, value in values.items()}
    return {**defaults, **own}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for two nested containers."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted({*old, *new}):
            path = f"{prefix}.{key}" if prefix else str(key)
            lines += differences(old.get(key), new.get(key), path)
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
