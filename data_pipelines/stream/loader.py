"""Loader: reads micro-batches of samples in stateless worker processes."""

from __future__ import annotations

import math
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.decode.sandbox import Killed
from data_pipelines.shards import meter
from data_pipelines.shards.meter import Reading
from data_pipelines.shards.source import Sample, SharedDecoding, Source
from data_pipelines.stream.limits import remedy
from data_pipelines.stream.sampling import (
    ATTEMPTS,
    Part,
    SamplePlan,
    SampleRef,
    StepSampler,
)
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
from xray.errors import BadSample, DataError, brief

Fields = dict[str, Tensor]

Transform = Callable[[Sample, np.random.Generator | None], Fields]
Collate = Callable[[Sequence[Fields]], Fields]


@dataclass(frozen=True)
class Replaced:
    """Record of a sample that could not be used and was replaced."""

    cause: str
    source: str
    shard: str  # name in the manifest
    key: str
    quarantine: bool  # True = the sample is not tried again


@dataclass
class Loaded:
    """Micro-batch or a part of it, with the samples that were replaced in it."""

    batch: Fields
    bad: list[Replaced] = field(default_factory=list)
    reading: Reading = field(default_factory=dict)  # the workers' counters of decoding and cache
    # Reason if there is no batch. A string, because an exception would lose its text on the way
    # from the worker.
    failure: str = ""

    @classmethod
    def joined(cls, parts: Sequence[Loaded], collate: Collate, pin: bool) -> Loaded:
        """Join the parts of a micro-batch, in order; raises DataError if one of them failed.

        Each part is padded to its longest sample; `collate` pads all to the longest of them.
        """
        whole = cls({})
        for part in parts:
            if part.failure:
                raise DataError(part.failure)
            whole.bad += part.bad
            meter.add(whole.reading, part.reading)
        whole.batch = parts[0].batch
        if len(parts) > 1:
            whole.batch = collate([row for part in parts for row in _rows(part.batch)])
        return whole.pin_memory() if pin else whole

    def pin_memory(self) -> Loaded:
        """Pin the batch in place, for copies to a GPU that the host does not wait for."""
        self.batch = {key: value.pin_memory() for key, value in self.batch.items()}
        return self


def _rows(batch: Fields) -> list[Fields]:
    """Split a batch into its samples."""
    columns = [value.unbind() for value in batch.values()]
    return [dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True)]


@dataclass
class StreamDataset(Dataset):
    """Map-style dataset indexed by SampleRef that loads a part of a micro-batch at a time."""

    plans: dict[str, SamplePlan]
    transform: Transform
    collate: Collate
    seed: int | None  # None = no randomness: centre crops, middle frames, first captions
    # the sample that was read last, and its place, for its other views
    _last: tuple[Any, Sample | None] = field(default=(None, None), init=False)

    def __getitems__(self, refs: list[SampleRef]) -> Loaded:
        bad: list[Replaced] = []
        try:
            batch = self.collate([self._load(ref, bad) for ref in refs])
            return Loaded(batch, bad, meter.take())
        except (DataError, OSError) as error:
            return Loaded({}, bad, failure=remedy(error))

    def _rng(self, ref: SampleRef, attempt: int, view: int = 0) -> np.random.Generator | None:
        if self.seed is None:
            return None
        words = [self.seed, zlib.crc32(ref.source.encode()), ref.position, attempt]
        return np.random.default_rng([*words, view] if view else words)

    def _sample(self, ref: SampleRef, attempt: int, shard: int, slot: int, member: int) -> Sample:
        """Read a sample; views of a position that follow each other share it, and its pixels."""
        source, size = self.plans[ref.source].source, (ref.resolution, ref.frames)
        if not ref.view:
            return source.sample(shard, member, *size, slot=slot)
        place = ref.source, ref.position, attempt, *size
        if self._last[0] != place or self._last[1] is None:
            sample = source.sample(shard, member, *size, slot=slot)
            shared = SharedDecoding(self._rng(ref, attempt))
            self._last = place, replace(sample, shared=shared)
        assert self._last[1] is not None
        return self._last[1]

    def _load(self, ref: SampleRef, bad: list[Replaced]) -> Fields:
        """Load a sample or its first usable replacement; append the unusable ones to `bad`."""
        plan = self.plans[ref.source]
        for attempt in range(ATTEMPTS):
            shard, slot = ref.shard, ref.slot
            if attempt != ref.attempt:
                shard, slot = plan.candidate(ref.position, attempt)
            member = plan.source.member(shard, slot)
            if attempt < ref.attempt or member in plan.quarantine.get(shard, ()):
                bad.append(_replaced(plan.source, shard, member, BadSample("in quarantine")))
                continue
            try:
                sample = self._sample(ref, attempt, shard, slot, member)
                return self.transform(sample, self._rng(ref, attempt, ref.view))
            except (BadSample, ValueError, OverflowError, RecursionError, UnicodeError) as problem:
                error = problem if isinstance(problem, BadSample) else _unusable(problem)
                bad.append(_replaced(plan.source, shard, member, error))
                if isinstance(error, Killed):
                    plan.quarantine.setdefault(shard, set()).add(member)
        last = bad[-1]
        raise DataError(
            f"source {ref.source!r}: {ATTEMPTS} samples in a row cannot be used, "
            f"the last is {last.key!r} of {last.shard} ({last.cause}): run xray data check on it"
        )


def _unusable(problem: Exception) -> BadSample:
    """Convert an unexpected error of a transform to BadSample, so that it is counted."""
    return BadSample("unusable sample", f"{type(problem).__name__}: {brief(problem)}")


def _replaced(source: Source, shard: int, member: int, error: BadSample) -> Replaced:
    key, name = source.index(shard).key(member), source.manifest.name(shard)
    return Replaced(error.cause, source.name, name, key, isinstance(error, Killed))


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
    memory of batches.
    """

    def __init__(
        self,
        sampler: StepSampler,
        transform: Transform,
        collate: Collate,
        seed: int | None,
        workers: int,
        pin: bool,
    ) -> None:
        self.sampler, self.workers = sampler, workers
        self._join = partial(Loaded.joined, collate=collate, pin=pin)
        parts = len(sampler.parts(sampler.steps[0])) if sampler.steps else 0
        ahead = read_ahead(workers, parts)
        self._loader: DataLoader[Loaded] = DataLoader(
            StreamDataset(sampler.plans, transform, collate, seed),
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
) -> Generator[list[Loaded]]:
    """Yield the micro-batches of each step of the sampler, in order; see `StepLoader`."""
    with closing(StepLoader(sampler, transform, collate, seed, workers, pin)) as loader:
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
