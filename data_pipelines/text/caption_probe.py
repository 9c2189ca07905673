"""Check of the first captions of a source, before a stage starts to train on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.text.captions import captions_of, texts_of
from xray.errors import DataError

MAX_CAPTIONS = 256  # to read
MAX_SHARDS = 8  # to read of a local source


class CaptionSample(NamedTuple):
    """Captions of the first samples of a source.

    pairs: samples with at least two captions. negatives: samples with hard negatives.
    """

    captions: list[str]
    pairs: int
    negatives: int


def look_at(source: Source, fields: Mapping[str, float], negatives: str = "") -> CaptionSample:
    """Read the captions of the first samples of a source.

    fields: JSON fields of the captions with weights, as for `read_captions`. negatives: JSON field
    of hard negatives, "" = none. Raises DataError if none of these samples has a caption.
    """
    captions: list[str] = []
    pairs, with_negatives, causes = 0, 0, list[str]()
    # Each shard of a remote source must be downloaded first, so read only one.
    shards = MAX_SHARDS if source.cache is None else 1
    for shard in range(min(len(source.manifest), shards)):
        for member in source.members(shard)[:MAX_CAPTIONS].tolist():
            try:
                files = source.read(shard, member, TEXT_FILES)
                texts = captions_of(files, fields)
                captions += texts
                pairs += len(texts) > 1
                with_negatives += bool(negatives and texts_of(files, negatives))
            except BadSample as error:
                causes.append(error.cause)
            if len(captions) >= MAX_CAPTIONS:
                return CaptionSample(captions, pairs, with_negatives)
    if not captions:
        where = f"data.sources.{source.name}.captions={dict(fields)}" if fields else "their json"
        raise DataError(
            f"none of the first {len(causes)} samples of source {source.name!r} has a caption "
            f"({causes[0] if causes else 'it has no samples'}): check {where}, and run xray data "
            "check"
        )
    return CaptionSample(captions, pairs, with_negatives)
