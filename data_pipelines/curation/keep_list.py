"""Sources narrowed to the keep-list of a curation."""

from __future__ import annotations

from data_pipelines.curation.tables import KeptSlots
from data_pipelines.shards.sidecar import open_sidecar
from data_pipelines.shards.source import Source
from xray.config import SourceConfig
from xray.errors import ConfigError


def keep_listed(source: Source, config: SourceConfig) -> Source:
    """A source with the samples of its keep-list, or with all where it names none.

    Raises ConfigError where its shards have none of that name, or one of other captions.
    """
    if not config.keep:
        return source
    found, key = open_sidecar(source, config.keep), f"data.sources.{source.name}"
    if found is None or "captions" not in found.facts:
        raise ConfigError(
            f"{key}.keep={config.keep}: its shards have no such keep-list; make it with xray data "
            "curate"
        )
    if found.facts["captions"] != config.captions:
        raise ConfigError(
            f"{key}.captions={config.captions}, but the texts of the keep-list {config.keep} were "
            f"chosen from captions={found.facts['captions']}: use these"
        )
    return source.with_slots(KeptSlots(found))
