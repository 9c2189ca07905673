"""What a step is made of on this rank: its samples' sizes, its micro-batches, their stream."""

from __future__ import annotations

import time
from collections.abc import Generator

from data_pipelines.shards.meter import Reading, add
from data_pipelines.stream.loader import Loaded, iterate_steps
from data_pipelines.stream.sampling import (
    SamplePlan,
    StepSampler,
    StepShape,
)
from stages.base import Stage
from xray.config import RunConfig
from xray.errors import DataError
from xray.training.step_shape import step_shape


class Feed:
    """A stream of steps, with an account of how long it was waited for."""

    def __init__(self, stream: Generator[list[Loaded]]) -> None:
        self._stream = stream
        self._waited = 0.0

    def next(self) -> tuple[list[Loaded], DataError | None]:
        """The next step's micro-batches, or why there are none."""
        start = time.perf_counter()
        try:
            return next(self._stream), None
        except DataError as error:
            return [], error
        finally:
            self._waited += time.perf_counter() - start

    def close(self) -> None:
        """Let go of the stream's workers, which would keep this process from its end."""
        self._stream.close()

    def waited(self) -> dict[str, float]:
        """The seconds since the last call that went into waiting for data."""
        seconds, self._waited = self._waited, 0.0
        return {"data/wait": seconds}

    def readings(self, loaded: list[Loaded]) -> dict[str, float]:
        """Decoding in ms per sample by modality, and the cache's share of hits, on this rank."""
        total: Reading = {}
        for item in loaded:
            add(total, item.reading)
        values = {
            f"data/{name}_ms": 1e3 * seconds / times
            for name, (times, seconds) in total.items()
            if name in ("image", "video")
        }
        hits, misses = (total.get(name, (0, 0.0))[0] for name in ("hit", "miss"))
        return values | ({"data/cache_hits": hits / (hits + misses)} if hits + misses else {})


def training_stream(
    stage: Stage, config: RunConfig, plans: dict[str, SamplePlan], steps: range, pin: bool
) -> Generator[list[Loaded]]:
    """The micro-batches of each step, in order."""

    def shape(step: int) -> StepShape:
        return step_shape(stage, config.blocks, config.progress(step))

    overfit = config.debug.overfit_batch
    sampler = StepSampler(config.blocks, plans, shape, steps, same=overfit)
    seed, workers = None if overfit else config.seed, config.data.workers
    return iterate_steps(sampler, stage.transform, stage.collate, seed, workers, pin)


def validation_stream(
    stage: Stage, config: RunConfig, plans: dict[str, SamplePlan], shape: StepShape
) -> Generator[list[Loaded]]:
    """One step: the fixed validation samples, without randomness."""
    sampler = StepSampler(config.validation, plans, lambda step: shape, range(1))
    workers = config.data.workers
    return iterate_steps(sampler, stage.transform, stage.collate, None, workers, pin=False)
