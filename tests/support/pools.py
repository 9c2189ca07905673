"""Pools to be curated, made for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shards import write_tar

from data_pipelines.curation.config import CurationConfig
from data_pipelines.curation.curate import Curated
from data_pipelines.shards.source import Source, open_source
from xray.config.loading import build


def config(tmp_path: Path, entries: object, **settings: Any) -> CurationConfig:
    """A config whose metadata are these entries, and nothing is sampled away unless t says so."""
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(entries), "utf-8")
    given = {"metadata": str(path), "t": 1e9, "workers": 1, **settings}
    return build(CurationConfig, given)


Rows = Sequence[Mapping[str, Any]]


def pool(folder: Path, shards: Sequence[Rows]) -> Source:
    """A source of samples that are json records with a key, and maybe their own `media`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(shards):
        files = {}
        for row in rows:
            record = {name: value for name, value in row.items() if name not in ("key", "media")}
            files[f"{row['key']}.jpg"] = row.get("media", b"no picture " + row["key"].encode())
            files[f"{row['key']}.json"] = json.dumps(record).encode()
        write_tar(folder / f"{number:05d}.tar", files)
    return open_source("pool", str(folder), "image")


def kept(curated: Curated) -> dict[str, list[int]]:
    """Key -> numbers of its texts."""
    found = {}
    for shard in range(len(curated.kept.counts)):
        for slot, member in enumerate(curated.slots.of(shard)[0].tolist()):
            key = curated.source.index(shard).key(member)
            assert key not in found
            found[key] = curated.slots.texts(shard, slot).tolist()
    return found


def taken(curated: Curated) -> dict[str, tuple[int, int]]:
    """Step -> (samples, texts) that it took."""
    steps = {step.name: (step.samples, step.texts) for step in curated.report.steps}
    return {name: counts for name, counts in steps.items() if counts != (0, 0)}
