"""Named data sets of an evaluation (eval.sets), each with the settings of its suites."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from xray.config.identity import identity
from xray.config.loading import build, read_yaml
from xray.errors import ConfigError, XrayError, nearest
from xray.evaluation.config import EvalConfig
from xray.evaluation.suite import Suite, SuiteConfig
from xray.evaluation.suites import SUITES, suite_named
from xray.files import is_system_name, nearest_path

SPLITS = ("train", "test", "val")  # folders in the folder of one set
SHARED = ("views", "batch_size", "precision")  # settings that all sets have from the evaluation


@dataclass(frozen=True)
class NamedSet:
    """A data set with a name, and the settings of the suites that it is evaluated with."""

    name: str
    suites: tuple[str, ...]
    config: EvalConfig  # has only this set's sections

    def settings(self, suite: Suite[Any]) -> dict[str, Any]:
        """Return all settings that the result of a suite depends on, as JSON values."""
        parts = {own.name: identity(self.config.of(own)) for own in (suite, *suite.reads)}
        return parts | {"views": identity(self.config.views), "precision": self.config.precision}


@dataclass(frozen=True)
class Entry:
    """An entry of eval.sets. folder: its data and suites are recognised (set_folders.py)."""

    name: str
    folder: str = ""
    suites: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)  # keys of the suites' sections


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name a set in an error, and its keys as they are in the set's settings."""
    try:
        yield
    except XrayError as error:
        text = str(error)
        for suite in SUITES:
            text = text.replace(f"eval.{suite.name}.", "")
        error.args = (f"set {name}: {text}",)
        raise


def read_entries(config: EvalConfig, root: str) -> list[Entry]:
    """List the entries of eval.sets; raises ConfigError for a wrong yaml or a missing folder."""
    from data_pipelines.ingest.labelled import place_of

    if not config.sets:
        return []
    where = place_of("eval.sets", config.sets, root)
    if where.endswith((".yaml", ".yml")):
        return [_entry(name, given, where) for name, given in read_yaml(where).items()]
    if not os.path.isdir(where):
        raise ConfigError(
            f"eval.sets={config.sets}: there is no folder {where}, and it is no .yaml"
            f"{nearest_path(where)}"
        )
    with os.scandir(where) as found:
        names = sorted(e.name for e in found if e.is_dir() and not is_system_name(e.name))
    if not names:
        raise ConfigError(f"eval.sets={config.sets} contains no folders: it needs one for each set")
    if {*names} <= {*SPLITS}:
        raise ConfigError(
            f"eval.sets={config.sets} is one data set, with {', '.join(names)}: give the folder "
            "that contains it"
        )
    return [Entry(name, os.path.join(where, name)) for name in names]


def check_entries(config: EvalConfig, root: str) -> None:
    """Check the entries of eval.sets without opening data; raises ConfigError."""
    for entry in read_entries(config, root):
        if not entry.folder:
            named_set(entry, config, ())


def named_sets(config: EvalConfig, root: str, asked: Sequence[str]) -> list[NamedSet]:
    """Return the sets of eval.sets with those of their suites that are asked for, () = all.

    Opens the data of folders to recognise them. Raises ConfigError, or DataError, naming the set.
    """
    found = [named_set(entry, config, asked) for entry in read_entries(config, root)]
    return [own for own in found if own.suites]


def named_set(entry: Entry, config: EvalConfig, asked: Sequence[str]) -> NamedSet:
    """Build the settings of a set; raises ConfigError, or DataError, naming the set."""
    with naming(entry.name):
        values, suites = dict(entry.values), entry.suites
        if entry.folder:
            from xray.evaluation.set_folders import recognise

            found = recognise(entry.name, entry.folder, config)
            values = {**found.values, **values}
            suites = suites or found.suites(asked)
        needed = [part for s in suites for part in (suite_named(s), *suite_named(s).reads)]
        _check_keys(entry, needed)
        sections = {s.name: _section(s, entry.name, values, config) for s in needed}
        shared = {name: getattr(config, name) for name in SHARED}
        own: EvalConfig = EvalConfig(**shared, **sections)
        own.validate()
        for suite in map(suite_named, suites):
            if not any(reader.has_data(own.of(reader)) for reader in (suite, *suite.reads)):
                keys = " and ".join(_part(suite).required_sets) or suite.data_keys()
                raise ConfigError(f"suite {suite.name} has no data: set {keys}")
    return NamedSet(entry.name, tuple(n for n in suites if not asked or n in asked), own)


def _entry(name: str, given: Any, where: str) -> Entry:
    """Read an entry of a yaml: a folder, or {suite: one or a list, folder or keys of the suite}."""
    with naming(name):
        values = {"folder": given} if isinstance(given, str) else given
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: write {name}: FOLDER, or {name}: {{suite: ..., KEY: ...}}")
        rest = {str(key): value for key, value in values.items()}
        suites, folder = rest.pop("suite", []), str(rest.pop("folder", ""))
        suites = [suites] if isinstance(suites, str) else suites
        if not isinstance(suites, list) or not (suites or folder):
            raise ConfigError(f"{where}: set suite, such as suite: zero_shot or suite: [knn, ...]")
        own = tuple(suite_named(str(suite)).name for suite in suites)
        beside = os.path.dirname(os.path.abspath(where))
        readers = [part for suite in map(suite_named, own) for part in (suite, *suite.reads)]
        parts = map(_part, readers)
        paths = {key for part in parts for key in (*part.required_sets, *part.optional_sets)}
        for key in rest.keys() & {*paths, "train", "test", "templates"}:
            rest[key] = _beside(rest[key], beside)
        return Entry(name, _beside(folder, beside) if folder else "", own, rest)


def _beside(path: Any, folder: str) -> Any:
    """Return a path, or several by name, from the folder of the yaml if it exists there."""
    if isinstance(path, Mapping):
        return {name: _beside(own, folder) for name, own in path.items()}
    if not isinstance(path, str):
        return path
    from data_pipelines.ingest.labelled import data_exists
    from data_pipelines.shards.manifest import resolve

    where = resolve(path, folder)
    return where if data_exists(where) else path


def _part(suite: Suite[Any]) -> type[SuiteConfig]:
    """Return the settings of one data set of a suite."""
    types = getattr(suite.Config, "__args__", None)  # of dict[str, X]
    part: type[SuiteConfig] = types[1] if types else suite.Config
    return part


def _section(suite: Suite[Any], name: str, values: Mapping[str, Any], config: EvalConfig) -> Any:
    """Build a set's section of a suite: its keys in `values`, and the evaluation's other settings.

    A suite of one data set, `shards`, takes `test` if it has none.
    """
    part, general = _part(suite), config.of(suite)
    names = {item.name for item in fields(part)}
    data = {*part.required_sets, *part.optional_sets, "modality", "split"}
    inherited = {}
    if isinstance(general, SuiteConfig):
        data |= {"captions"} if general.sets() else set()  # of those, which held_out may have set
        inherited = {key: value for key, value in asdict(general).items() if key not in data}
    own = {key: value for key, value in values.items() if key in names}
    if "shards" in names and "shards" not in own and "test" in values:
        own["shards"] = values["test"]
    section = build(part, {**inherited, **own})
    return {name: section} if isinstance(general, dict) else section


def _check_keys(entry: Entry, suites: Sequence[Suite[Any]]) -> None:
    """Raise ConfigError for a key that none of these suites has."""
    known = {item.name for suite in suites for item in fields(_part(suite))}
    for key in entry.values:
        if key not in known:
            there = nearest(key, known) or f"; there are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {key!r}{there}")
