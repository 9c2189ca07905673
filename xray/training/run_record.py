"""Record of a run in its folder, run.json: everything that determines the run's result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.shards.manifest import as_named
from data_pipelines.shards.source import Source
from stages.base import Stage
from xray import dist
from xray.artifacts.artifact import Artifact
from xray.config import RunConfig
from xray.config.identity import absent, differences, filled, identity, with_older
from xray.errors import ConfigError
from xray.files import sha256_file
from xray.records import read_record
from xray.training.mirror import Mirror
from xray.urls import has_signature, redact_all

C = TypeVar("C", bound=RunConfig)


@dataclass
class Record:
    """Contents of a run.json: everything that determines a run's result."""

    stage: str
    config: dict[str, Any]
    data: dict[str, str]  # digests of the sources
    parents: dict[str, str]  # digests of the artifacts, by slot
    inputs: dict[str, Any]


def run_record(
    stage: Stage, config: RunConfig, sources: Mapping[str, Source], parents: Mapping[str, Artifact]
) -> dict[str, Any]:
    """Return the record of everything that determines a run's result."""
    weights = Path(config.model.pretrained)
    pretrained = {"pretrained": sha256_file(weights)} if weights.is_file() else {}
    return {
        "stage": stage.name,
        "config": identity(config),
        "data": {name: source.digest for name, source in sorted(sources.items())},
        "parents": {slot: artifact.digest for slot, artifact in parents.items()},
        "inputs": {**stage.inputs(), **pretrained},
    }


def as_begun(config: C) -> C:
    """Give settings whose default has changed the values that the run began with. Collective.

    The run is the one that rank 0 finds in the folder or at the mirror. A setting that differs from
    today's default is kept. Raises ConfigError for a damaged run.json, and DataError if there is no
    run and the mirror cannot be reached.
    """
    record: dict[str, Any] = {}

    def read() -> None:
        record.update(recorded(Path(config.out), config))
        if not record and config.train.mirror:
            mirror = Mirror(config.train.mirror, config.stage, Path(config.out))
            mirror.holds(lambda folder: record.update(recorded(folder, config)))

    dist.on_main(read, dist.PREPARATION, "reading what the run began with")
    return with_older(config, dist.broadcast_object(record.get("config", {})))


def holds_another_run(config: RunConfig) -> bool:
    """Return True if the config's folder holds a run with other settings; data are not compared.

    The text section is left out, because a run completes it from the LLM.
    """
    record = recorded(Path(config.out), config)
    if not record:
        return False
    old = redact_all(record)
    config = with_older(config, record["config"])
    own = json.loads(json.dumps(identity(config, whole=True)))
    if own["data"]["decode"] == "auto":
        own["data"]["decode"] = old["config"]["data"]["decode"]
    if config.train.epochs is not None:  # the data are not at hand
        for name in ("samples", "epochs"):
            own["train"][name] = old["config"]["train"][name]
    return bool(differences({**old["config"], "text": None}, {**own, "text": None}))


def completed(record: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Add the settings that a record leaves out, with the values that they had then."""
    return {**record, "config": filled(record.get("config", {}), absent(type(config)()))}


def as_recorded(sources: Mapping[str, Source], config: RunConfig) -> dict[str, Source]:
    """Give the sources of an older run the digests and seeds that signed URLs had in it."""
    config_then = recorded(Path(config.out), config).get("config", {})
    named = {}
    for name, source in sources.items():
        then = config_then.get("data", {}).get("sources", {}).get(name) or {}
        pattern = str(then.get("shards", ""))
        signed = has_signature(pattern)
        manifest = as_named(source.manifest, pattern) if signed else source.manifest
        named[name] = replace(source, manifest=manifest)
    return named


def recorded(out: Path, config: RunConfig) -> dict[str, Any]:
    """Return the record of a folder's run, completed; {} if there is none."""
    path = out / "run.json"
    if not path.is_file():
        return {}
    return completed(
        asdict(read_record(path, Record, ConfigError, "; choose another out=")), config
    )
