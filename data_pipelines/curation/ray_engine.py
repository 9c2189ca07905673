"""Ray engine: computes a table per shard with Ray Data, on one machine or many.

No other module imports ray.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.columns import Columns
from data_pipelines.shards.process_pool import Progress, reporting_killed_workers
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.sidecar import Work, save_table, saved_table
from data_pipelines.shards.source import Source
from xray.errors import ConfigError, XrayError

PER_TASK = 8  # shards per Ray task; fewer if some workers would get no task


def make_tables(
    source: Source, name: str, work: Work, workers: int, progress: Progress | None = None
) -> None:
    """Compute the missing tables with `workers` Ray actors, one core each, and write them.

    This process writes the tables, so the workers only need to read the shards. Raises ConfigError
    if ray is not installed, or if workers on other machines could not find the shards.
    """
    folder = source.manifest.folder
    if "RAY_ADDRESS" in os.environ and not is_remote(folder) and not Path(folder).is_absolute():
        raise ConfigError(
            f"engine=ray on a cluster needs an absolute path or a URL of the shards, not {folder}"
        )
    shards = range(len(source.manifest))
    missing = [shard for shard in shards if saved_table(source, name, shard) is None]
    if not missing:
        return
    made = _results(work, missing, workers)
    for shard, columns in progress(made, len(missing)) if progress else made:
        save_table(source, name, shard, columns)


def _results(work: Work, shards: list[int], workers: int) -> Iterator[tuple[int, Columns]]:
    """Yield (shard, work(shard)) as they complete; each actor gets `work` once."""
    data, exceptions = _ray(workers)
    workers = min(workers, len(shards))
    tasks = max(workers, len(shards) // PER_TASK)
    rows = data.from_items([{"shard": shard} for shard in shards], override_num_blocks=tasks)
    rows = rows.map_batches(
        _Worker,
        fn_constructor_args=(work,),
        batch_size=1,
        num_cpus=1,
        compute=data.ActorPoolStrategy(size=workers),
    )
    with reporting_killed_workers(exceptions.RayActorError):
        for row in rows.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, XrayError):
                raise result
            yield int(row["shard"]), result


class _Worker:
    """Ray actor that calls `work` on shards."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        try:
            result: Columns | XrayError = self._work(int(batch["shard"][0]))
        except XrayError as error:  # returned, because Ray would wrap a raised error
            result = error
        return {"shard": batch["shard"], "result": np.array([pickle.dumps(result)], object)}


def _ray(workers: int) -> tuple[Any, Any]:
    """Import Ray and start it if it is not running; return ray.data and ray.exceptions."""
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(
            f"engine=ray needs Ray Data ({error.name} is missing): pip install 'ray[data]', or use "
            "engine=local"
        ) from error
    if not ray.is_initialized():  # Ray then runs until this process ends
        cores = None if os.environ.get("RAY_ADDRESS") else workers  # a cluster knows its cores
        quiet = logging.ERROR
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data, ray.exceptions
