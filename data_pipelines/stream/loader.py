"""Loader: reads micro-batches of samples in stateless worker processes."""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.decode.device import beside_computation, decode
from data_pipelines.shards import meter
from data_pipelines.shards.source import Source
from data_pipelines.stream.dataset import StreamDataset, Transform
from data_pipelines.stream.loaded import Collate, Fields, Loaded, rows_of
from data_pipelines.stream.sampling import Part, StepSampler
from data_pipelines.stream.workers import (
    LoaderContext,
    end_workers,
    read_batches,
    received,
    reporting_dead_workers,
)
from xray import dist
from xray.config import DataConfig
from xray.config.schedule import value_at
from xray.errors import DataError


def _ignore_signals(worker: int) -> None:
    """Ignore signals that end a run; the main process handles them and still needs batches."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _identity(loaded: Any) -> Any:
    return loaded  # `__getitems__` has already collated the batch


def read_ahead(workers: int, parts: int) -> int:
    """Return the number of parts that wait in shared memory. parts: of a step."""
    return max(4 * workers, parts)


class StepLoader:
    """Reader of a sampler's steps, whose workers are kept until it is closed.

    A worker reads a part of a micro-batch at a time. The parts of a step, or 4 per worker if these
    are more, are read ahead and wait in shared memory. seed: see `StreamDataset`. pin: pin the
    memory of batches. decoder: device that decodes the JPEGs of images; None = the workers do.
    """

    def __init__(
        self,
        sampler: StepSampler,
        transform: Transform,
        collate: Collate,
        seed: int | None,
        workers: int,
        pin: bool,
        decoder: torch.device | None = None,
    ) -> None:
        self.sampler, self.workers, self.pin, self.decoder = sampler, workers, pin, decoder
        self.dataset = StreamDataset(
            sampler.plans, transform, collate, seed, defer=decoder is not None
        )
        parts = len(sampler.parts(sampler.steps[0])) if sampler.steps else 0
        ahead = read_ahead(workers, parts)
        self._loader: DataLoader[Loaded] = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_identity,
            prefetch_factor=math.ceil(ahead / workers) if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_signals,
            multiprocessing_context=LoaderContext() if workers else None,
        )
        self._parts: Any = None

    def __iter__(self) -> Generator[list[Loaded]]:
        """Yield the micro-batches of each step, in order; may be repeated.

        Raises DataError if a batch cannot be loaded or a worker is killed.
        """
        if self._parts is None:
            dist.settle(self.workers)
        with reporting_dead_workers():
            self._parts = iter(self._loader)
        for step in self.sampler.steps:
            yield _read_step(self._parts, self.sampler, step, self._join)

    def _join(self, parts: list[Loaded]) -> Loaded:
        """Join the parts of a micro-batch; raises DataError if one of them failed."""
        whole = Loaded.joined(parts, self.dataset.collate)
        if whole.pictures and self.decoder is not None:
            with beside_computation(self.decoder):
                self._decode(whole, self.decoder)
        return whole.pin_memory() if self.pin else whole

    def _decode(self, whole: Loaded, device: torch.device) -> None:
        """Decode the images of a micro-batch on the device, or here if it cannot."""
        jpegs = sum(place is not None for part in whole.pictures for place in part.jpegs)
        pixels, failed = decode(whole.pictures, whole.batch["pixels"], device)
        if failed:
            self._load_again(whole, failed, pixels)
        whole.batch["pixels"] = pixels
        whole.pictures.clear()
        on_device = jpegs - len(failed)
        counts = {"device": (on_device, 0.0), "fallback": (len(pixels) - on_device, 0.0)}
        meter.add(whole.reading, counts)

    def _load_again(self, whole: Loaded, numbers: list[int], pixels: Tensor) -> None:
        """Load samples of a micro-batch on the CPU, which replaces those that it cannot decode.

        The others stay padded as they are, perhaps to the length of a sample that is replaced.
        """
        rows, entries = rows_of(whole.batch), iter(whole.bad)
        bad = [list(islice(entries, origin.replaced)) for origin in whole.origins]
        for number in numbers:
            bad[number] = []
            try:
                row = self.dataset.load(whole.origins[number].ref, bad[number])
            except OSError as error:
                raise DataError(str(error)) from error
            pixels[number] = row["pixels"].to(pixels.device)
            rows[number] = {**row, "pixels": rows[number]["pixels"]}
        whole.bad = [entry for entries in bad for entry in entries]
        whole.batch = self.dataset.collate(rows)
        meter.add(whole.reading, meter.take())

    def close(self) -> None:
        """End the workers."""
        if self.workers and self._parts is not None:
            end_workers(self._parts)


def iterate_steps(
    sampler: StepSampler,
    transform: Transform,
    collate: Collate,
    seed: int | None,
    workers: int,
    pin: bool,
    decoder: torch.device | None = None,
) -> Generator[list[Loaded]]:
    """Yield the micro-batches of each step of the sampler, in order; see `StepLoader`."""
    settings = sampler, transform, collate, seed, workers, pin, decoder
    with closing(StepLoader(*settings)) as loader:
        yield from loader


def _read_step(
    batches: Iterator[Loaded],
    sampler: StepSampler,
    step: int,
    join: Callable[[list[Loaded]], Loaded],
) -> list[Loaded]:
    """Read the parts of a step, and join those of a micro-batch as soon as it is complete."""
    order = sampler.parts(step)
    missing = Counter(part.number for part in order)
    read: dict[Part, Loaded] = {}
    whole: dict[int, Loaded] = {}
    for part in order:
        with reporting_dead_workers(f" at step {step + 1}"):
            read[part] = received(next(batches))
        missing[part.number] -= 1
        if not missing[part.number]:
            mine = sorted(each for each in read if each.number == part.number)
            whole[part.number] = join([read.pop(each) for each in mine])
    return [whole[number] for number in sorted(whole)]


class WholeDataset(Dataset):
    """Dataset of all samples of a source, in shard order, without randomness."""

    def __init__(self, source: Source, transform: Transform, data: DataConfig) -> None:
        self.source = source
        self.transform = transform
        self.size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
        self.members = list(source.places())  # (shard, member) of each sample

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, item: Any) -> Fields | str:
        return self.load(item)

    def load(self, number: int, rng: np.random.Generator | None = None) -> Fields | str:
        """Load a sample, or return the reason: an exception would lose its text in a worker."""
        shard, member = self.members[number]
        try:
            sample = self.source.sample(shard, member, *self.size)
            return self.transform(sample, rng)
        except DataError as error:
            index = self.source.index(shard)
            return f"sample {index.key(member)!r} of {index.path} cannot be used: {error}"


def iterate_source(
    source: Source,
    transform: Transform,
    collate: Collate,
    data: DataConfig,
    batches: Iterable[Sequence[int]],
) -> Iterator[Fields]:
    """Yield batches of samples of a source, for evaluation; raises DataError.

    batches: numbers of the samples of each batch, in the order of the source.
    """
    dataset = WholeDataset(source, transform, data)
    yield from iterate_batches(dataset, collate, data.workers, batch_sampler=batches)


def iterate_batches(
    dataset: WholeDataset, collate: Collate, workers: int, **order: Any
) -> Iterator[Fields]:
    """Yield the batches of a dataset; raises DataError for a sample that cannot be used.

    order: arguments of the DataLoader, such as `batch_size` or `batch_sampler`.
    """

    def collate_or_fail(rows: list[Fields | str]) -> Fields | str:
        failures = [row for row in rows if isinstance(row, str)]
        return failures[0] if failures else collate(rows)  # type: ignore[arg-type]

    loader = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate_or_fail,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=LoaderContext() if workers else None,
        **order,
    )
    for batch in read_batches(loader):
        if isinstance(batch, str):
            raise DataError(batch)
        yield batch
