"""Compares a tar with what its index and its manifest record of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.columns import Columns, open_columns
from data_pipelines.shards.remote import ShardCache, is_remote
from data_pipelines.shards.remote_index import remote_index_file
from data_pipelines.shards.side_files import possible_paths
from data_pipelines.shards.tar_index import INDEX_VERSION, ShardIndex, check_index
from xray.files import printable, sha256_file


@dataclass(frozen=True)
class Recorded:
    """Record of a tar in an index or a manifest; sha256 "" = not computed."""

    size: int
    digest: str
    sha256: str


@dataclass(frozen=True)
class Compared:
    """Result of a comparison; None: nothing is recorded."""

    index: bool | None
    sha256: bool | None
    error: str  # all differences, "" if there are none


def compare(path: str, index: ShardIndex, manifest: Recorded | None, cache: ShardCache) -> Compared:
    """Compare the index made from a tar with its manifest and with its index file.

    path: of the tar, which may be a URL; the path of `index` is its local copy.
    """
    if is_remote(path):
        places = [remote_index_file(path, cache)]
    else:
        places = possible_paths(Path(f"{path}.index"))
    file = next((place for place in places if place.is_file()), None)
    columns, facts, damage = _opened(file) if file is not None else ({}, {}, "")
    recorded = [manifest] if manifest is not None else []
    if facts:
        recorded.append(Recorded(facts["size"], facts["digest"], facts["sha256"]))
    same: bool | None = None
    same_sha256: bool | None = None
    wrong, errors = [], []
    own = index.facts["size"], index.facts["digest"]
    if recorded:
        same = all((r.size, r.digest) == own for r in recorded)
        if not same:
            sizes = " and ".join(sorted({f"{r.size:,}" for r in recorded}))
            wrong.append(f"different samples, {own[0]:,} bytes, recorded {sizes}")
    checksums = {r.sha256 for r in recorded if r.sha256}
    if checksums:
        sha256 = sha256_file(Path(index.path))
        same_sha256 = checksums == {sha256}
        if not same_sha256:
            others = " and ".join(sorted(c[:12] for c in checksums))
            wrong.append(f"sha256 {sha256[:12]}, recorded {others}")
    if wrong:
        errors.append(f"shard {printable(path)} changed since it was indexed: {'; '.join(wrong)}")
    if facts.get("digest") == own[1] and not _equal(columns, facts, index):
        damage = "is damaged: the samples are at other places in the tar"
    if damage:
        same = False
        errors.append(f"its index {file} {damage}: delete it and run xray data index")
    return Compared(same, same_sha256, "; ".join(errors))


def _opened(file: Path) -> tuple[Columns, Mapping[str, Any], str]:
    """Return columns and facts of an index file, and its damage; runs ignore other versions."""
    try:
        columns, facts = open_columns(file)
        if facts.get("version") != INDEX_VERSION:
            return {}, {}, ""
        check_index(file, columns, facts)
    except (OSError, ValueError) as error:
        return {}, {}, str(error).removeprefix(f"{file} ")
    return columns, facts, ""


def _equal(columns: Columns, facts: Mapping[str, Any], index: ShardIndex) -> bool:
    names = facts["extensions"] == index.facts["extensions"]
    return names and all(np.array_equal(columns[k], own) for k, own in index.columns.items())
