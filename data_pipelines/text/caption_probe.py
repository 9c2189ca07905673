"""A look at the first captions of a source, before a stage is built on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.text.captions import captions_of, texts_of
from xray.errors import DataError

LOOKED_AT = 256  # captions


class Looked(NamedTuple):
    """Captions of some samples; how many of these have two, and how many have negatives."""

    captions: list[str]
    pairs: int
    negatives: int


def look_at(source: Source, fields: Mapping[str, float], negatives: str = "") -> Looked:
    """What captions some of a source's samples have, before a run.

    Raises DataError where none of them has a caption in these json fields.
    """
    found: list[str] = []
    pairs, wrong, causes = 0, 0, list[str]()
    # of a remote source one shard: it has to be fetched for it
    for shard in range(min(len(source.manifest), 8 if source.cache is None else 1)):
        for member in source.members(shard)[:LOOKED_AT].tolist():
            try:
                files = source.read(shard, member, TEXT_FILES)
                own = captions_of(files, fields)
                found += own
                pairs += len(own) > 1
                wrong += bool(negatives and texts_of(files, negatives))
            except BadSample as error:
                causes.append(error.cause)
            if len(found) >= LOOKED_AT:
                return Looked(found, pairs, wrong)
    if not found:
        where = f"data.sources.{source.name}.captions={dict(fields)}" if fields else "their json"
        raise DataError(
            f"none of the first {len(causes)} samples of source {source.name!r} has a caption "
            f"({causes[0] if causes else 'there are none'}): see {where}, and xray data check"
        )
    return Looked(found, pairs, wrong)
