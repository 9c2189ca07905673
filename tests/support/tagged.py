"""Sources of images with tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards import jpeg, write_tar

from data_pipelines.shards.source import Source, open_source


def tagged(folder: Path, samples: Sequence[Mapping[str, object]], each: int = 4) -> Source:
    """Make a source of images with these JSON files, `each` samples per shard."""
    folder.mkdir(exist_ok=True)
    for first in range(0, len(samples), each):
        files = {}
        for number, content in enumerate(samples[first : first + each], start=first):
            files[f"{number:05d}.jpg"] = jpeg()
            files[f"{number:05d}.json"] = json.dumps(content).encode()
        write_tar(folder / f"{first // each:03d}.tar", files)
    return open_source("photos", str(folder), "image")


def with_tags(folder: Path, rows: Sequence[Sequence[str]], each: int = 4) -> Source:
    """Make a source of images with these hashtags."""
    return tagged(folder, [{"hashtags": list(row)} for row in rows], each)
