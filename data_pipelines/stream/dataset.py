"""Dataset of a stream: loads the samples of a micro-batch, and replaces those it cannot use."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data_pipelines.decode.device import PendingJpeg, Pictures
from data_pipelines.decode.sandbox import Killed
from data_pipelines.shards import meter
from data_pipelines.shards.source import Sample, SharedDecoding, Source
from data_pipelines.stream.limits import remedy
from data_pipelines.stream.loaded import Collate, Fields, Loaded, Origin, Replaced
from data_pipelines.stream.sampling import ATTEMPTS, SamplePlan, SampleRef
from data_pipelines.text.captions import NO_CAPTION, leave_out_uncaptioned
from data_pipelines.text.names import name_at
from xray.errors import BadSample, DataError, brief

Transform = Callable[[Sample, np.random.Generator | None], Fields]


@dataclass
class StreamDataset(Dataset):
    """Map-style dataset indexed by SampleRef that loads a part of a micro-batch at a time."""

    plans: dict[str, SamplePlan]
    transform: Transform
    collate: Collate
    seed: int | None  # None = no randomness: centre crops, middle frames, first captions
    defer: bool = False  # leave JPEGs to the device (`data.decode`)
    # the sample that was read last, and its place, for its other views
    _last: tuple[Any, Sample | None] = field(default=(None, None), init=False)

    def __getitems__(self, refs: list[SampleRef]) -> Loaded:
        bad: list[Replaced] = []
        loaded = Loaded({}, bad)
        images = [PendingJpeg() for _ in refs] if self._defers(refs) else []
        try:
            rows = []
            for number, ref in enumerate(refs):
                before = len(bad)
                rows.append(self.load(ref, bad, images[number] if images else None))
                loaded.origins.append(Origin(ref, len(bad) - before))
            if images and "pixels" in rows[0]:
                loaded.pictures.append(Pictures.taken_from(rows, images))
            loaded.batch, loaded.reading = self.collate(rows), meter.take()
            return loaded
        except (DataError, OSError) as error:
            return Loaded({}, bad, failure=remedy(error))

    def _defers(self, refs: Sequence[SampleRef]) -> bool:
        """Return True if the device may decode these samples, which have one source."""
        return self.defer and self.plans[refs[0].source].source.modality == "image"

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

    def load(self, ref: SampleRef, bad: list[Replaced], image: PendingJpeg | None = None) -> Fields:
        """Load a sample or its first usable replacement; append the unusable ones to `bad`.

        image: takes the sample's image if the device can decode it. Raises DataError.
        """
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
                if image is not None:
                    sample = replace(sample, deferred=image)
                return self.transform(sample, self._rng(ref, attempt, ref.view))
            except (BadSample, ValueError, OverflowError, RecursionError, UnicodeError) as problem:
                error = problem if isinstance(problem, BadSample) else _unusable(problem)
                bad.append(_replaced(plan.source, shard, member, error))
                if isinstance(error, Killed):
                    plan.quarantine.setdefault(shard, set()).add(member)
        last = bad[-1]
        uncaptioned = last.cause == NO_CAPTION
        mend = leave_out_uncaptioned(ref.source) if uncaptioned else "run xray data check on it"
        raise DataError(
            f"source {ref.source!r}: {ATTEMPTS} samples in a row cannot be used, "
            f"the last is {last.key!r} of {last.shard} ({last.cause}): {mend}"
        )


def _unusable(problem: Exception) -> BadSample:
    """Convert an unexpected error of a transform to BadSample, so that it is counted."""
    return BadSample("unusable sample", f"{type(problem).__name__}: {brief(problem)}")


def _replaced(source: Source, shard: int, member: int, error: BadSample) -> Replaced:
    key, name = source.index(shard).key(member), source.manifest.name(shard)
    shown = name_at(source, shard, member)
    return Replaced(error.cause, source.name, name, key, isinstance(error, Killed), shown)
