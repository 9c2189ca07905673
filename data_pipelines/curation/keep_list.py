"""Keep-lists: restrict a source to the samples and texts that a curation kept."""

from __future__ import annotations

from data_pipelines.curation.tables import KeptSlots
from data_pipelines.shards.sidecar import open_sidecar
from data_pipelines.shards.source import Source
from xray.config import SourceConfig
from xray.errors import ConfigError


def keep_listed(source: Source, config: SourceConfig) -> Source:
    """Restrict a source to the samples of its keep-list; without one, return it unchanged.

    Raises ConfigError if its shards have no keep-list of that name, or if the keep-list was made
    from other captions.
    """
    if not config.keep:
        return source
    sidecar, key = open_sidecar(source, config.keep), f"data.sources.{source.name}"
    if sidecar is None or "captions" not in sidecar.facts:
        raise ConfigError(
            f"{key}.keep={config.keep}: its shards have no such keep-list; make it with xray data "
            "curate"
        )
    if sidecar.facts["captions"] != config.captions:
        raise ConfigError(
            f"{key}.captions={config.captions}, but the texts of the keep-list {config.keep} were "
            f"chosen from captions={sidecar.facts['captions']}: set it to the same fields"
        )
    return source.with_slots(KeptSlots(sidecar))
