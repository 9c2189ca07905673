"""The loader: refs to batches in worker processes that hold no state."""

from __future__ import annotations

import signal
import warnings
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.decode.sandbox import Killed
from data_pipelines.shards import meter
from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.meter import Reading
from data_pipelines.shards.source import Sample, Source
from data_pipelines.stream.sampling import ATTEMPTS, SamplePlan, SampleRef, StepSampler, turned
from xray import dist
from xray.config import DataConfig
from xray.config.schedule import value_at
from xray.errors import DataError, brief

Fields = dict[str, Tensor]

KILLED_SECONDS = 30.0  # that a killed process may take to be gone

warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")


Transform = Callable[[Sample, np.random.Generator | None], Fields]
Collate = Callable[[Sequence[Fields]], Fields]


@dataclass(frozen=True)
class Replaced:
    """A sample that could not be used."""

    cause: str
    source: str
    shard: str  # its name in the manifest
    key: str
    quarantine: bool  # not to be tried again


@dataclass
class Loaded:
    """A micro-batch and the samples that had to be replaced in it."""

    batch: Fields
    bad: list[Replaced] = field(default_factory=list)
    reading: Reading = field(default_factory=dict)  # decoding and the cache, in the worker
    failure: str = ""  # why there is no batch; an exception would lose its text in the worker

    def pin_memory(self) -> Loaded:
        """What the DataLoader calls where batches go to a GPU."""
        self.batch = {key: value.pin_memory() for key, value in self.batch.items()}
        return self


class StreamDataset(Dataset):
    """Map-style access by SampleRef; fetches a whole micro-batch at a time.

    Without a seed nothing is random: centre crops, middle frames, first captions.
    """

    def __init__(
        self,
        plans: dict[str, SamplePlan],
        transform: Transform,
        collate: Collate,
        seed: int | None,
    ) -> None:
        self.plans = plans
        self.transform = transform
        self.collate = collate
        self.seed = seed

    def __getitems__(self, refs: list[SampleRef]) -> Loaded:
        bad: list[Replaced] = []
        try:
            batch = self.collate([self._load(ref, bad) for ref in refs])
            return Loaded(batch, bad, meter.take())
        except (DataError, OSError) as error:
            return Loaded({}, bad, failure=str(error))

    def _rng(self, ref: SampleRef, attempt: int) -> np.random.Generator | None:
        if self.seed is None:
            return None
        source = zlib.crc32(ref.source.encode())
        return np.random.default_rng([self.seed, source, ref.position, attempt])

    def _load(self, ref: SampleRef, bad: list[Replaced]) -> Fields:
        """The sample, or the first of its deterministic stand-ins that can be used."""
        plan = self.plans[ref.source]
        for attempt in range(ATTEMPTS):
            place = (ref.shard, ref.slot)
            if attempt != ref.attempt:
                place = plan.candidate(ref.position, attempt)
            member = plan.source.member(*place)
            if attempt < ref.attempt or member in plan.quarantine.get(place[0], ()):
                bad.append(_replaced(plan.source, place[0], member, BadSample("in quarantine")))
                continue
            try:
                size = ref.resolution, ref.frames
                sample = plan.source.sample(place[0], member, *size, slot=place[1])
                return self.transform(sample, self._rng(ref, attempt))
            except (BadSample, ValueError, OverflowError, RecursionError, UnicodeError) as problem:
                error = problem if isinstance(problem, BadSample) else _unusable(problem)
                bad.append(_replaced(plan.source, place[0], member, error))
                if isinstance(error, Killed):
                    plan.quarantine.setdefault(place[0], set()).add(member)
        last = bad[-1]
        raise DataError(
            f"source {ref.source!r}: {ATTEMPTS} samples in a row cannot be used, "
            f"the last is {last.key!r} of {last.shard} ({last.cause})"
        )


def _unusable(problem: Exception) -> BadSample:
    """Odd content that a transform did not foresee: it counts, and too much of it ends the run."""
    return BadSample("unusable sample", f"{type(problem).__name__}: {brief(problem)}")


def _replaced(source: Source, shard: int, member: int, error: BadSample) -> Replaced:
    key, name = source.index(shard).key(member), source.manifest.name(shard)
    return Replaced(error.cause, source.name, name, key, isinstance(error, Killed))


def _ignore_signals(worker: int) -> None:
    """Leave the end of a run to its main process, which still needs batches to save."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _identity(loaded: Any) -> Any:
    return loaded  # `__getitems__` has collated already


def iterate_steps(
    sampler: StepSampler,
    transform: Transform,
    collate: Collate,
    seed: int | None,
    workers: int,
    pin: bool,
) -> Generator[list[Loaded]]:
    """The micro-batches of each step of the sampler, in order; raises DataError."""
    dataset = StreamDataset(sampler.plans, transform, collate, seed)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
    )
    dist.settle(workers)
    batches: Any = iter(loader)
    try:
        yield from _by_step(batches, sampler)
    finally:
        if workers:
            # They ignore SIGTERM, which is how the loader would end them: one that waits for a
            # shard or hangs in a picture would keep this process from its end. Not killed before
            # the loader has let go of them: it takes that for a crash.
            batches._shutdown_workers()
            for worker in batches._workers:
                worker.kill()
                worker.join(KILLED_SECONDS)


def _by_step(batches: Iterator[Loaded], sampler: StepSampler) -> Iterator[list[Loaded]]:
    for step in sampler.steps:
        order = turned(len(sampler.shape(step).micro), step)
        with _naming_lost_workers(f" at step {step + 1}"):
            came = {number: next(batches) for number in order}
        loaded = [came[number] for number in sorted(order)]
        for item in loaded:
            if item.failure:
                raise DataError(item.failure)
        yield loaded


@contextmanager
def _naming_lost_workers(when: str = "") -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):  # torch's words for a worker that is gone
            raise
        raise DataError(
            f"a loader process ended{when}: killed for memory, or by a picture that crashes its "
            f"decoder; lower data.workers, or run `xray data check` ({error})"
        ) from error


class WholeDataset(Dataset):
    """Every sample of a source by its number, in shard order, without randomness."""

    def __init__(self, source: Source, transform: Transform, data: DataConfig) -> None:
        self.source = source
        self.transform = transform
        self.size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
        self.places = list(source.places())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: Any) -> Fields | str:
        return self.load(item)

    def load(self, number: int, rng: np.random.Generator | None = None) -> Fields | str:
        """The sample, or why it cannot be used: an exception would lose its text in a worker."""
        shard, member = self.places[number]
        try:
            sample = self.source.sample(shard, member, *self.size)
            return self.transform(sample, rng)
        except DataError as error:
            index = self.source.index(shard)
            return f"sample {index.key(member)!r} of {index.path} cannot be used: {error}"


def iterate_source(
    source: Source, transform: Transform, collate: Collate, data: DataConfig, batch_size: int
) -> Iterator[Fields]:
    """Batches of a whole source in order, for evaluation; raises DataError for a bad sample."""
    dataset = WholeDataset(source, transform, data)
    yield from iterate_batches(dataset, collate, data.workers, batch_size=batch_size)


def iterate_batches(
    dataset: WholeDataset, collate: Collate, workers: int, **order: Any
) -> Iterator[Fields]:
    """Batches in the order that DataLoader's `batch_size` or `batch_sampler` says; raises
    DataError for a bad sample."""

    def collate_or_fail(rows: list[Fields | str]) -> Fields | str:
        failures = [row for row in rows if isinstance(row, str)]
        return failures[0] if failures else collate(rows)  # type: ignore[arg-type]

    loader = DataLoader(dataset, num_workers=workers, collate_fn=collate_or_fail, **order)
    dist.settle(workers)
    with _naming_lost_workers():
        for batch in loader:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch
