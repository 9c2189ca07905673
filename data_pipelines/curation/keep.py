"""Sources narrowed to the keep-list of a curation."""

from __future__ import annotations

from data_pipelines.curation.tables import KeptSlots
from data_pipelines.sidecars import open_sidecar
from data_pipelines.sources import Source
from xray.errors import ConfigError


def keep_listed(source: Source, name: str) -> Source:
    """A source with the samples of a keep-list, "" = all; raises ConfigError where there is none
    of that name for its shards."""
    if not name:
        return source
    found = open_sidecar(source, name)
    if found is None:
        raise ConfigError(
            f"data.sources.{source.name}.keep={name}: its shards have no such keep-list; make it "
            "with xray data curate"
        )
    return source.with_slots(KeptSlots(found))
