"""Checks every sample of a data set in many processes: counts, sizes and broken samples."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.checks.check_index import Recorded
from data_pipelines.checks.check_shard import ShardCheck, Stats, check_files, check_shard
from data_pipelines.ingest.user_data import kind_of, list_files
from data_pipelines.shards.columns import open_columns
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.process_pool import reporting_killed_workers
from data_pipelines.shards.remote import ShardCache, is_remote
from data_pipelines.shards.remote_index import side_file
from data_pipelines.shards.shard_list import find_shards
from data_pipelines.shards.side_files import possible_paths
from xray.config import DataConfig
from xray.files import printable
from xray.processes import process_pool
from xray.urls import conceal

PART = 1000  # files of a folder or a list that are one row
Progress = Callable[[int, int], None]  # (shards done, all shards)


@dataclass
class CheckReport:
    """Result of a check; shards in the order of their names."""

    pattern: str
    shards: list[ShardCheck]
    stats: Stats

    @property
    def broken(self) -> bool:
        """Return True if any shard or sample is broken."""
        return any(shard.error or shard.causes for shard in self.shards)

    def joined(self, other: CheckReport) -> CheckReport:
        """Return this report and another as one."""
        stats = Stats()
        stats.add(self.stats)
        stats.add(other.stats)
        return CheckReport(f"{self.pattern}, {other.pattern}", self.shards + other.shards, stats)


def check(
    pattern: str,
    cache: ShardCache,
    config: DataConfig,
    workers: int,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every sample of shards, a folder or a list.

    A row is a shard, also one that cannot be read, or a part of the files. Raises DataError for
    other data, and if a worker process was killed.
    """
    pattern = conceal(pattern)
    jobs = _jobs(os.path.expanduser(pattern), cache, config)
    rows, stats = {}, Stats()
    with reporting_killed_workers(), process_pool(min(workers, len(jobs))) as pool:
        # Not a list: a future keeps its result, thumbnails included.
        for future in as_completed({pool.submit(*job) for job in jobs.values()}):
            row, more = future.result()
            rows[row.path] = row
            stats.add(more)
            if progress is not None:
                progress(len(rows), len(jobs))
    return CheckReport(pattern, [rows[printable(name)] for name in jobs], stats)


def _jobs(where: str, cache: ShardCache, config: DataConfig) -> dict[str, tuple[Any, ...]]:
    """Return a function with its arguments for each row of a check, by the row's name."""
    if kind_of(where, ("shards", "folder", "list"), "xray data check and stats") == "shards":
        paths = find_shards(where)
        recorded, damaged = _recorded(paths, cache)
        rows = {path: (check_shard, path, recorded.get(path), cache, config) for path in paths}
        return rows | {path: (_damaged, path, error) for path, error in damaged.items()}
    items, jobs = list_files(where), {}
    for start in range(0, len(items), PART):
        part = items[start : start + PART]
        name = where if len(part) == len(items) else f"{where}:{start + 1}-{start + len(part)}"
        jobs[name] = (check_files, name, part, config)
    return jobs


def _damaged(path: str, error: str) -> tuple[ShardCheck, Stats]:
    """Return the row of a manifest that cannot be used."""
    return ShardCheck(printable(path), printable(error)), Stats()


def _recorded(
    paths: Iterable[str], cache: ShardCache
) -> tuple[dict[str, Recorded], dict[str, str]]:
    """Return what the manifest of its folder records of each tar, and the damaged manifests.

    Both by path; of a damaged manifest the error.
    """
    recorded, damaged = {}, {}
    for folder in sorted({os.path.dirname(path) for path in paths}):
        path = f"{folder or '.'}/shards.manifest"
        try:
            with _local_copy(path, cache) as file:
                manifest = Manifest(folder, *open_columns(file))  # memory-mapped: outlives the file
                if not manifest.is_current:  # others are not used
                    continue
            for shard, name in enumerate(manifest.names):
                size, sha256 = manifest.tar(shard)
                digest = manifest.index_digest(shard)
                recorded[os.path.join(folder, name)] = Recorded(size, digest, sha256 or "")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError) as error:
            reason = str(error).removeprefix(f"{file} ")
            named = path if is_remote(path) else file
            damaged[path] = f"manifest {named} {reason}: delete it and run xray data index"
    return recorded, damaged


@contextmanager
def _local_copy(path: str, cache: ShardCache) -> Iterator[Path]:
    """Yield the path of a file, or of a temporary copy of a remote one; FileNotFoundError."""
    if not is_remote(path):
        places = possible_paths(Path(path)) if os.path.isdir(os.path.dirname(path)) else []
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise FileNotFoundError(path)
        yield file
        return
    content = side_file(path, cache.patience)
    if content is None:
        raise FileNotFoundError(path)
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(content)
        copy.flush()
        yield Path(copy.name)
