"""Features, captions and labels of an evaluation source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipelines.captions import TEXT_FILES, captions_of, metadata_of
from data_pipelines.decode import BadSample
from data_pipelines.loader import Fields, iterate_source
from data_pipelines.sources import Sample, Source
from data_pipelines.transforms import load_pixels
from xray.config import DataConfig
from xray.errors import DataError
from xray.progress import progress_of


@dataclass
class Features:
    """rows: [N, D] normalised. labels: [N] long, -1 where a sample has none."""

    rows: Tensor
    labels: Tensor


def _label_of(files: dict[str, bytes]) -> int:
    """The class number: the cls file, else an integer json field `label`."""
    if "cls" in files:
        try:
            return int(files["cls"])
        except ValueError as error:
            raise DataError(f"cls file holds {files['cls'][:20]!r}, not a number") from error
    label = metadata_of(files).get("label")
    return label if isinstance(label, int) else -1


def extract(
    source: Source,
    encode: Callable[[Tensor], Tensor],
    data: DataConfig,
    batch_size: int = 64,
) -> Features:
    """Encode a whole source in order; data gives resolution, frames and workers."""

    def transform(sample: Sample, rng: np.random.Generator | None) -> Fields:
        return {
            "pixels": load_pixels(sample, data, rng),
            "label": torch.tensor(_label_of(sample.files)),
        }

    def collate(rows: list[Fields]) -> Fields:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    rows, labels = list[Tensor](), list[Tensor]()
    batches = iterate_source(source, transform, collate, data, batch_size)  # type: ignore[arg-type]
    for batch in progress_of(source.name)(batches, math.ceil(len(source) / batch_size)):
        rows.append(encode(batch["pixels"]))
        labels.append(batch["label"])
    return Features(torch.cat(rows), torch.cat(labels))


def read_all_captions(source: Source, fields: Mapping[str, float] | None = None) -> list[list[str]]:
    """The captions of each sample of a source, in order; none where it has none."""
    result = []
    for shard, member in source.places():
        try:
            result.append(captions_of(source.read(shard, member, TEXT_FILES), fields))
        except BadSample:
            result.append([])
    return result
