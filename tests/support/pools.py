"""Small pools for tests of curation."""

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
    """Make a config with these entries as metadata; the default t keeps all texts."""
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(entries), "utf-8")
    return build(CurationConfig, {"metadata": str(path), "t": 1e9, "workers": 1, **settings})


Rows = Sequence[Mapping[str, Any]]


def pool(folder: Path, shards: Sequence[Rows]) -> Source:
    """Make a source from rows: JSON records, with the `key` and optionally the `media` of each."""
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
    """Return key -> numbers of the kept texts."""
    result = {}
    for shard in range(len(curated.kept.counts)):
        for slot, member in enumerate(curated.slots.of(shard)[0].tolist()):
            key = curated.source.index(shard).key(member)
            assert key not in result
            result[key] = curated.slots.texts(shard, slot).tolist()
    return result


def dropped(curated: Curated) -> dict[str, tuple[int, int]]:
    """Return step -> (samples, texts) that it dropped, without steps that dropped nothing."""
    steps = {step.name: (step.samples, step.texts) for step in curated.report.steps}
    return {name: counts for name, counts in steps.items() if counts != (0, 0)}
