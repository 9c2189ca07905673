"""Micro-batches as the loader yields them, with the samples that were replaced in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from data_pipelines.decode.device import Pictures
from data_pipelines.shards import meter
from data_pipelines.shards.meter import Reading
from data_pipelines.stream.sampling import SampleRef
from xray.errors import DataError

Fields = dict[str, Tensor]
Collate = Callable[[Sequence[Fields]], Fields]


@dataclass(frozen=True)
class Replaced:
    """Record of a sample that could not be used and was replaced."""

    cause: str
    source: str
    shard: str  # name in the manifest
    key: str
    quarantine: bool  # True = the sample is not tried again
    name: str = ""  # original file name, or the key


@dataclass(frozen=True)
class Origin:
    """Place in the plan of a sample of a batch, and the number of samples that it replaces."""

    ref: SampleRef
    replaced: int


@dataclass
class Loaded:
    """Micro-batch or a part of it, with the samples that were replaced in it."""

    batch: Fields
    bad: list[Replaced] = field(default_factory=list)
    reading: Reading = field(default_factory=dict)  # the workers' counters of decoding and cache
    # Reason if there is no batch. A string, because an exception would lose its text on the way
    # from the worker.
    failure: str = ""
    # What the device has still to decode, and the origin of each sample: `pixels` are empty.
    pictures: list[Pictures] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Loaded], collate: Collate) -> Loaded:
        """Join the parts of a micro-batch, in order; raises DataError if one of them failed.

        Each part is padded to its longest sample; `collate` pads all to the longest of them.
        """
        whole = cls({})
        for part in parts:
            if part.failure:
                raise DataError(part.failure)
            whole.bad += part.bad
            whole.pictures += part.pictures
            whole.origins += part.origins
            meter.add(whole.reading, part.reading)
        whole.batch = parts[0].batch
        if len(parts) > 1:
            whole.batch = collate([row for part in parts for row in rows_of(part.batch)])
        return whole

    def pin_memory(self) -> Loaded:
        """Pin the batch in place, for copies to a GPU that the host does not wait for."""
        self.batch = {
            key: value.pin_memory() if value.device.type == "cpu" else value  # pixels on the GPU
            for key, value in self.batch.items()
        }
        return self


def rows_of(batch: Fields) -> list[Fields]:
    """Split a batch into its samples."""
    columns = [value.unbind() for value in batch.values()]
    return [dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True)]
