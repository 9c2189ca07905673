"""Tables of shards made by Ray Data, on one machine or many. The only importer of ray."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.columns import Columns
from data_pipelines.shards.process_pool import Progress
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.sidecar import Work, save_table, saved_table
from data_pipelines.shards.source import Source
from xray.errors import ConfigError, DataError, XrayError

PER_TASK = 8  # shards that one task makes the tables of, where there are many


def make_tables(
    source: Source, name: str, work: Work, workers: int, progress: Progress | None = None
) -> None:
    """Write the tables that are missing, each made by one of `workers` actors of a core each.

    Tables come back to this process, which writes them: workers need to see the shards only.
    Raises ConfigError where ray is not installed or its workers could not find the shards.
    """
    folder = source.manifest.folder
    if "RAY_ADDRESS" in os.environ and not is_remote(folder) and not Path(folder).is_absolute():
        raise ConfigError(f"engine=ray on a cluster needs a whole path or a URL, not {folder}")
    shards = range(len(source.manifest))
    missing = [shard for shard in shards if saved_table(source, name, shard) is None]
    if not missing:
        return
    made = _results(work, missing, workers)
    for shard, columns in progress(made, len(missing)) if progress else made:
        save_table(source, name, shard, columns)


def _results(work: Work, shards: list[int], workers: int) -> Iterator[tuple[int, Columns]]:
    """(shard, work(shard)) as they are done; each actor gets `work` once, and keeps what it builds
    from it."""
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
    try:
        for row in rows.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, XrayError):
                raise result
            yield int(row["shard"]), result
    except exceptions.RayActorError as error:
        raise DataError("a Ray worker was killed, maybe for memory: try fewer workers") from error


class _Worker:
    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        try:
            result: Columns | XrayError = self._work(int(batch["shard"][0]))
        except XrayError as error:  # Ray would wrap it
            result = error
        return {"shard": batch["shard"], "result": np.array([pickle.dumps(result)], object)}


def _ray(workers: int) -> tuple[Any, Any]:
    """Ray Data and Ray's exceptions, of a Ray that was started where none was."""
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(
            f"engine=ray needs Ray Data ({error.name} is missing): pip install 'ray[data]', or use "
            "engine=local"
        ) from error
    if not ray.is_initialized():  # it stays up for the tables to come, and ends with this process
        cores = None if os.environ.get("RAY_ADDRESS") else workers  # a cluster has its own number
        quiet = logging.ERROR
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data, ray.exceptions
