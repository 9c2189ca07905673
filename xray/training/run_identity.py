"""Identity of a run: recorded when it begins, compared when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.shards.source import Source
from stages.base import Stage
from xray.artifacts.artifact import Artifact
from xray.config import RunConfig
from xray.config.identity import differences, filled, identity
from xray.errors import ConfigError
from xray.files import sha256_file


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


def check_same_run(out: Path, record: dict[str, Any], defaults: dict[str, Any], place: str) -> None:
    """Raise ConfigError if a folder holds a run whose record differs.

    defaults: values of settings newer than the run. place: name of the folder or URL in the
    message.
    """
    old = _recorded(out, defaults)
    changed = differences(old, json.loads(json.dumps(record))) if old else []
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{place} holds another run: {changed[0]}{more}; choose another "
            f"{'train.mirror' if '://' in place else 'out'}=, or delete that folder"
        )


def holds_another_run(config: RunConfig) -> bool:
    """Return True if the config's folder holds a run with other settings; data are not compared.

    The text section is left out, because a run completes it from the LLM.
    """
    old = _recorded(Path(config.out), identity(type(config)()))
    if not old:
        return False
    own = json.loads(json.dumps(identity(config)))
    return bool(differences({**old["config"], "text": None}, {**own, "text": None}))


def _recorded(out: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a folder's run, {} if there is none; defaults: see `check_same_run`."""
    try:
        old = dict(json.loads((out / "run.json").read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{out}/run.json cannot be read: {error}") from error
    return {**old, "config": filled(old.get("config", {}), defaults)}
