"""Tables of shards made by Ray's workers, on one machine or many. The only importer of ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from data_pipelines.columns import Columns
from data_pipelines.processes import Progress
from data_pipelines.sidecars import Work, save_table, saved_table
from data_pipelines.sources import Source
from xray.errors import ConfigError, DataError

AHEAD = 4  # shards asked for per worker: results wait in memory until their turn


def make_tables(
    source: Source, name: str, work: Work, workers: int, progress: Progress | None = None
) -> None:
    """Write the tables that are missing, each made by one of `workers` actors of a core each.

    Tables come back to this process, which writes them: workers need to see the shards only.
    Raises ConfigError where ray is not installed.
    """
    shards = range(len(source.manifest))
    missing = [shard for shard in shards if saved_table(source, name, shard) is None]
    made = zip(missing, _results(work, missing, workers), strict=True)
    for shard, columns in progress(made, len(missing)) if progress else made:
        save_table(source, name, shard, columns)


def _results(work: Work, shards: list[int], workers: int) -> Iterator[Columns]:
    """work(shard) in order; each actor gets `work` once, and keeps what it builds from it."""
    ray = _ray()
    if not shards:
        return
    if not ray.is_initialized():  # it stays up for the tables to come, and ends with this process
        cores = None if os.environ.get("RAY_ADDRESS") else workers  # a cluster has its own number
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    try:
        actor = ray.remote(max_restarts=3, max_task_retries=3)(_Worker)
        sent = ray.put(work)
        actors = [actor.remote(sent) for _ in range(min(workers, len(shards)))]
        waiting: list[Any] = []
        for number, shard in enumerate(shards):
            waiting.append(actors[number % len(actors)].table.remote(shard))
            if len(waiting) > AHEAD * len(actors):
                yield ray.get(waiting.pop(0))
        while waiting:
            yield ray.get(waiting.pop(0))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # as if it had been raised here
    except ray.exceptions.RayActorError as error:
        raise DataError("a Ray worker was killed, maybe for memory: try fewer workers") from error


class _Worker:
    def __init__(self, work: Work) -> None:
        self._work = work

    def table(self, shard: int) -> Columns:
        return self._work(shard)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("engine=ray needs Ray: pip install ray, or use engine=local") from error
    return ray
