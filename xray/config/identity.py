"""Identity of a config: the fields that change the result, their hash, and differences."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to nested dicts and lists."""
    return dataclasses.asdict(config)


def identity(config: Any) -> dict[str, Any]:
    """Return the config as nested dicts, without its runtime fields."""
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
    """Return the sha256 of the identity fields."""
    return hash_json(identity(config))


def hash_json(value: Any) -> str:
    """Return the sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def filled(values: Any, defaults: Any) -> Any:
    """Add keys that are missing from `defaults`, at every level, to read older records."""
    if not (isinstance(values, Mapping) and isinstance(defaults, Mapping)):
        return values
    own = {key: filled(value, defaults.get(key)) for key, value in values.items()}
    return {**defaults, **own}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """List the differences of two nested containers as lines `key: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted({*old, *new}):
            path = f"{prefix}.{key}" if prefix else str(key)
            lines += differences(old.get(key), new.get(key), path)
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
