"""Identity of a config: the fields that change the result, their hash, and differences."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

C = TypeVar("C", bound=Any)


def runtime(default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """Declare a field that does not change the result; the identity leaves it out."""
    return dataclasses.field(default=default, default_factory=factory, metadata={"runtime": True})


def added(
    default: Any = dataclasses.MISSING,
    factory: Any = dataclasses.MISSING,
    older: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field that older configs lack: the identity leaves its default out.

    So their hashes stay the same, and folders and files that are named by a hash are found.
    older: value that older files have without the field, if it is not today's default, or if a run
    replaces the default when it begins.
    """
    metadata = {"added": True} | ({} if older is dataclasses.MISSING else {"older": older})
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def left_open(older: Any) -> Any:
    """Declare a field of None that a run decides when it begins.

    older: its default before, which stands for None in the identity: hashes stay the same.
    """
    return dataclasses.field(default=None, metadata={"older": older})


def older_values(config: Any) -> dict[str, Any]:
    """Return the values that older files have without a field, where today's default differs.

    config: a dataclass or an instance of one; the sections in it are left out.
    """
    items = dataclasses.fields(config)
    return {item.name: item.metadata["older"] for item in items if "older" in item.metadata}


def absent(config: Any) -> dict[str, Any]:
    """Return the values of the fields that an older record lacks, as nested dicts.

    config: an instance with today's defaults.
    """
    values: dict[str, Any] = identity(config, whole=True)
    for name in values:
        if dataclasses.is_dataclass(section := getattr(config, name)):
            values[name] = absent(section)
    return values | older_values(config)


def lacking(config: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the older values of the fields that a record lacks, as nested dicts.

    config: an instance of the record's config. A section that the record lacks is left out.
    """
    values = older_values(config)
    found = {name: value for name, value in values.items() if name not in record}
    for item in dataclasses.fields(config):
        section, own = getattr(config, item.name), record.get(item.name)
        if dataclasses.is_dataclass(section) and isinstance(own, Mapping):
            found |= {item.name: inner} if (inner := lacking(section, own)) else {}
    return found


def changed_defaults(
    config: Any, record: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, bool]]:
    """Yield settings whose default has changed, unless the config sets them: (key, value, older).

    value: that of the record. older: whether the record is of before the change, and lacks the key.
    """
    for item in dataclasses.fields(config):
        own, then = getattr(config, item.name), record.get(item.name)
        if dataclasses.is_dataclass(own):
            inner = then if isinstance(then, Mapping) else {}
            yield from changed_defaults(own, inner, f"{prefix}{item.name}.")
        elif "added" in item.metadata and own == _default(item):
            older = item.metadata.get("older", own)
            if older != own:
                yield f"{prefix}{item.name}", record.get(item.name, older), item.name not in record


def with_older(config: C, record: Mapping[str, Any]) -> C:
    """Give settings whose default has changed the values of a record, unless they differ from it.

    record: the same config as nested dicts; {} changes nothing.
    """
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value, then = getattr(config, item.name), record.get(item.name)
        if dataclasses.is_dataclass(value) and then:
            changed[item.name] = with_older(value, then)
        elif "older" in item.metadata and item.name in record and value == _default(item):
            changed[item.name] = then
    return dataclasses.replace(config, **changed)


def identity(config: Any, whole: bool = False) -> Any:
    """Return a config, or a part of it, as nested dicts without the runtime fields.

    whole: keep the defaults of `added` fields, to compare configs.
    """
    if dataclasses.is_dataclass(config):
        values = [(item, getattr(config, item.name)) for item in dataclasses.fields(config)]
        return {
            item.name: identity(_decided(item, value), whole)
            for item, value in values
            if "runtime" not in item.metadata
            and (whole or "added" not in item.metadata or value != _default(item))
        }
    if isinstance(config, dict):
        return {key: identity(item, whole) for key, item in config.items()}
    if isinstance(config, list):
        return [identity(item, whole) for item in config]
    return config


def _decided(item: dataclasses.Field[Any], value: Any) -> Any:
    unknown = value is None and "added" not in item.metadata
    return item.metadata.get("older") if unknown else value


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


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
