"""Restriction of a source to the samples that have captions: `data.sources.NAME.keep=captioned`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_pipelines.shards.columns import Columns
from data_pipelines.shards.sidecar import CopySlots, open_sidecar, write_sidecar
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import check_fields, find_captions
from xray.config.identity import hash_json
from xray.errors import ConfigError
from xray.progress import log_once, progress_of
from xray.words import count

CAPTIONED = "captioned"  # the value of `keep`


def keep_captioned(source: Source, fields: Mapping[str, float], workers: int = 1) -> Source:
    """Restrict a source to the samples that have a caption, and log how many there are.

    fields: JSON fields of the captions, as for `read_captions`. The texts are read once, by
    `workers` processes; the numbers of the samples are stored beside the shards. Raises ConfigError
    if no sample has a caption.
    """
    facts = {"captions": list(fields), "source": source.digest}
    name, shown = f"{CAPTIONED}-{hash_json(facts)[:12]}", progress_of(f"captions of {source.name}")
    find = CaptionedMembers(source, dict(fields))
    kept = open_sidecar(source, name) or write_sidecar(source, name, find, facts, workers, shown)
    found, key = int(kept.counts.sum()), f"data.sources.{source.name}"
    told = f"{found:,} of {count(len(source), 'sample')} have captions"
    if not found:
        fix = check_fields(source, fields)
        raise ConfigError(f"{key}.keep={CAPTIONED}: {told}: {fix}")
    log_once(f"{key}.keep={CAPTIONED}: {told}")
    return source.with_slots(CopySlots(kept))


@dataclass(frozen=True)
class CaptionedMembers:
    """Function that finds the members of a shard with captions; pickled to the worker processes.

    Columns of the table: members [k] int32 in ascending order, and copies [k] int32, all 0.
    """

    source: Source
    fields: dict[str, float]

    def __call__(self, shard: int) -> Columns:
        members = np.unique(self.source.members(shard))
        has = [bool(find_captions(self.source, shard, m, self.fields)) for m in members.tolist()]
        kept = members[np.array(has, bool)].astype(np.int32)
        return {"members": kept, "copies": np.zeros(len(kept), np.int32)}
