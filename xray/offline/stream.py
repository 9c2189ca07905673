"""Every sample of a source through a model, shard by shard; what is written already is skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.columns import Columns
from data_pipelines.decode import BadSample
from data_pipelines.sidecars import Sidecar, finish_sidecar, save_table, saved_table
from data_pipelines.sources import Source
from data_pipelines.transforms import load_pixels
from xray.artifact import Artifact
from xray.config import DataConfig
from xray.errors import DataError
from xray.schedule import value_at

Progress = Callable[[int, int], None]  # (samples done, all samples)
Place = tuple[int, int]  # (shard, member)


def data_of(artifact: Artifact, workers: int) -> DataConfig:
    """How an artifact's own run read its samples, at its final sizes."""
    section = artifact.manifest["config"]["data"]
    names = {item.name for item in dataclasses.fields(DataConfig)}
    plain = {k: v for k, v in section.items() if k in names - {"sources", "blocks", "validation"}}
    return dataclasses.replace(DataConfig(**plain), workers=workers)


class _Places(Dataset):
    def __init__(self, source: Source, places: Sequence[Place], data: DataConfig) -> None:
        self.source, self.places, self.data = source, places, data
        self.size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int) -> tuple[int, Tensor | str]:
        """(number, pixels), or the reason why there are none."""
        place = self.places[item]
        try:
            return item, load_pixels(self.source.sample(*place, *self.size), self.data, None)
        except BadSample as error:
            return item, error.cause
        except DataError as error:  # of the shard: it would lose its text in the worker
            return item, f"! {error}"


def pixels_of(
    source: Source, places: Sequence[Place], data: DataConfig, batch_size: int
) -> Iterator[tuple[list[int], Tensor | None, dict[int, str]]]:
    """(numbers of the places that can be read, their pixels [B, T, 3, S, S], cause by number).

    In order, without randomness. Raises DataError for a shard that cannot be read.
    """
    dataset = _Places(source, places, data)
    loader = DataLoader(dataset, batch_size, num_workers=data.workers, collate_fn=list)
    for rows in loader:
        bad = {number: found for number, found in rows if isinstance(found, str)}
        for cause in bad.values():
            if cause.startswith("! "):
                raise DataError(cause[2:])
        good = [(number, found) for number, found in rows if number not in bad]
        pixels = torch.stack([found for _, found in good]) if good else None
        yield [number for number, _ in good], pixels, bad


def write_from_model(
    source: Source,
    name: str,
    model: Callable[[Tensor, Sequence[Place]], list[Any]],
    pack: Callable[[int, Mapping[int, Any]], Columns],
    facts: Mapping[str, Any],
    data: DataConfig,
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[Sidecar, dict[str, int]]:
    """Write a sidecar of what a model says of each sample; returns it and the bad samples' causes.

    model: (pixels, their places) -> a result per sample. pack: (shard, results by member) -> the
    shard's table. A shard is written once its last sample is done, so a second call goes on.
    """
    todo = [s for s in range(len(source.manifest)) if saved_table(source, name, s) is None]
    places = [(shard, member) for shard in todo for member in source.members(shard).tolist()]
    left = {shard: len(source.members(shard)) for shard in todo}
    total, done = len(source), len(source) - len(places)
    found: dict[int, dict[int, Any]] = {shard: {} for shard in todo}
    causes: dict[str, int] = {}
    for numbers, pixels, bad in pixels_of(source, places, data, batch_size):
        here = [places[number] for number in numbers]
        for (shard, member), result in zip(here, _run(model, pixels, here), strict=True):
            found[shard][member] = result
        for cause in bad.values():
            causes[cause] = causes.get(cause, 0) + 1
        for shard, _ in [*here, *(places[number] for number in bad)]:
            left[shard] -= 1
            if not left[shard]:
                save_table(source, name, shard, pack(shard, found.pop(shard)))
        done += len(numbers) + len(bad)
        if progress is not None:
            progress(done, total)
    tables = [saved_table(source, name, shard) for shard in range(len(source.manifest))]
    return finish_sidecar(source, name, [t for t in tables if t is not None], facts), causes


def _run(
    model: Callable[[Tensor, Sequence[Place]], list[Any]], pixels: Tensor | None, here: list[Place]
) -> Iterable[Any]:
    return [] if pixels is None else model(pixels, here)


def spread(source: Source, most: int) -> list[Place]:
    """At most so many places, evenly spread over a source."""
    ends = np.cumsum(source.counts, dtype=np.int64)
    picks = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(np.int64))
    shards = np.searchsorted(ends, picks, side="right")
    slots = picks - (ends[shards] - source.counts[shards])
    return [
        (int(shard), source.member(int(shard), int(slot)))
        for shard, slot in zip(shards, slots, strict=True)
    ]
