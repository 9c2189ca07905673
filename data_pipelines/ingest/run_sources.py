"""The sources of a training run, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.ingest.kind import Request
from data_pipelines.ingest.user_data import open_data
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import Source, check_same_on_all_ranks, make_cache
from xray import dist
from xray.config import DataConfig
from xray.errors import DataError


def open_sources(data: DataConfig, names: Sequence[str]) -> dict[str, Source]:
    """Open the sources that a run's blocks use; rank 0 indexes first, the others read its manifest.

    Raises DataError for data that is no set of shards, and for shards that cannot be used.
    """
    remote = any(is_remote(resolve(data.sources[name].shards, data.root)) for name in names)
    cache = make_cache(data) if remote else None

    def open_all() -> dict[str, Source]:
        opened = {}
        for name in names:
            config = data.sources[name]
            where = resolve(config.shards, data.root)
            own = Request(name, config.modality, config.animations, cache, verify=dist.is_main())
            try:
                opened[name] = open_data(where, own, ("shards",), "training")
            except DataError as error:
                raise DataError(f"data.sources.{name}: {error}") from error
        return opened

    sources = dist.main_first(open_all)
    check_same_on_all_ranks(sources)
    return sources
