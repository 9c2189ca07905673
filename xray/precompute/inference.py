"""Inference of a model over every sample of a source; finished shards are skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.sidecar import Sidecar, finish_sidecar, save_table, saved_table
from data_pipelines.shards.source import Source
from data_pipelines.stream.workers import LoaderContext, read_batches
from xray.config import DataConfig
from xray.config.schedule import value_at
from xray.errors import BadSample, DataError
from xray.progress import Progress

Place = tuple[int, int]  # (shard, member)
Model = Callable[[Tensor, Sequence[Place]], list[Any]]  # pixels of places -> a result per place
Pack = Callable[[int, Mapping[int, Any]], Columns]  # a shard, results by member -> its table


class Places(Sequence[Place]):
    """Samples of some shards as (shard, member), computed when asked for."""

    def __init__(self, source: Source, shards: Sequence[int]) -> None:
        self.source, self.shards = source, shards
        self.ends = np.cumsum(source.counts[list(shards)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: Any) -> Any:
        at = int(np.searchsorted(self.ends, number, side="right"))
        slot = number - int(self.ends[at - 1] if at else 0)
        return self.shards[at], self.source.member(self.shards[at], slot)


class _Pixels(Dataset):
    def __init__(self, source: Source, places: Sequence[Place], data: DataConfig) -> None:
        self.source, self.places, self.data = source, places, data
        self.size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int) -> tuple[Place, Tensor | str]:
        """Return a place with its pixels, or with the reason why there are none."""
        place = self.places[item]
        try:
            return place, load_pixels(self.source.sample(*place, *self.size), self.data, None)
        except BadSample as error:
            return place, error.cause
        except DataError as error:  # of the shard: a worker would lose its message
            return place, f"! {error}"


Read = tuple[list[Place], Tensor | None, dict[Place, str]]


def _collate(rows: list[tuple[Place, Tensor | str]]) -> Read:
    good = [(place, result) for place, result in rows if isinstance(result, Tensor)]
    bad = {place: result for place, result in rows if isinstance(result, str)}
    pixels = torch.stack([result for _, result in good]) if good else None
    return [place for place, _ in good], pixels, bad


def cut(numbers: range, size: int) -> Iterator[range]:
    """Split numbers into chunks of this size."""
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def pixels_of(
    source: Source, places: Sequence[Place], data: DataConfig, batches: Iterable[Sequence[int]]
) -> Iterator[Read]:
    """Yield (readable places, their pixels [B, T, 3, S, S], cause of failure by place).

    batches: indices into `places`, in order. Raises DataError for a shard that cannot be read.
    """
    loader: DataLoader[Any] = DataLoader(
        _Pixels(source, places, data),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=data.workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=LoaderContext() if data.workers else None,
    )
    for good, pixels, bad in read_batches(loader):
        for cause in bad.values():
            if cause.startswith("! "):
                raise DataError(cause[2:])
        yield good, pixels, bad


def write_from_model(
    source: Source,
    name: str,
    model: Model,
    pack: Pack,
    facts: Mapping[str, Any],
    totals: Mapping[str, np.ndarray],
    data: DataConfig,
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[Sidecar, dict[str, int]]:
    """Write a model's output for each sample as a sidecar; returns it, and failures by cause.

    Each shard is written when its last sample is done, so a second call continues.
    """
    todo = [s for s in range(len(source.manifest)) if saved_table(source, name, s) is None]
    places = Places(source, todo)
    total, done = len(source), len(source) - len(places)
    read = dict.fromkeys(todo, 0)  # samples read per shard
    results: dict[int, dict[int, Any]] = {}
    causes = Counter[str]()
    batches = cut(range(len(places)), batch_size)
    for here, pixels, bad in pixels_of(source, places, data, batches):
        made = [] if pixels is None else model(pixels, here)
        for (shard, member), result in zip(here, made, strict=True):
            results.setdefault(shard, {})[member] = result
        causes.update(bad.values())
        for shard, _ in [*here, *bad]:
            read[shard] += 1
            if read[shard] == source.counts[shard]:
                save_table(source, name, shard, pack(shard, results.pop(shard, {})))
        done += len(here) + len(bad)
        if progress is not None:
            progress(done, total)
    return finish_sidecar(source, name, facts, totals), causes


def spread(source: Source, most: int) -> list[Place]:
    """Choose at most this many places, evenly spaced over a source."""
    places = Places(source, range(len(source.manifest)))
    picks = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).astype(np.int64))
    return [places[number] for number in picks.tolist()]
