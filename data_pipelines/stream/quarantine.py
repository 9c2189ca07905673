"""Quarantine: samples that are skipped because their decode process had to be killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipelines.stream.sampling import SamplePlan
from xray.errors import ArtifactError
from xray.records import parse_record
from xray.urls import redact


@dataclass(frozen=True)
class Entry:
    """Quarantined sample. Its names stay valid if the shards are indexed again."""

    source: str
    shard: str
    key: str
    cause: str


def exclude(entries: Iterable[Entry], plans: Mapping[str, SamplePlan]) -> None:
    """Exclude these samples from the plans; names that no longer exist are ignored."""
    entries = list(entries)
    numbers = {
        name: {text: number for number, text in enumerate(plans[name].source.manifest.names)}
        for name in {entry.source for entry in entries} & plans.keys()
    }
    for entry in entries:
        shard = numbers.get(entry.source, {}).get(redact(entry.shard))
        if shard is None:
            continue
        plan = plans[entry.source]
        keys = plan.source.index(shard).keys
        if entry.key in keys:
            plan.quarantine.setdefault(shard, set()).add(keys.index(entry.key))


def save(entries: Iterable[Entry], path: Path) -> None:
    """Write the entries to a file, one JSON object per line."""
    path.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in entries), "utf-8")


def load(path: Path) -> list[Entry]:
    """Read the entries from a file; [] if it does not exist. Raises ArtifactError if broken."""
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
        return [parse_record(line, Entry) for line in lines]
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the quarantine file {path} cannot be read: {error}; use another checkpoint"
        ) from error
