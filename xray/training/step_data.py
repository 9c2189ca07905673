"""Micro-batches of training and validation steps on this rank."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from data_pipelines.shards.meter import Reading, add
from data_pipelines.stream.loader import Loaded, iterate_steps
from data_pipelines.stream.sampling import SamplePlan, StepSampler, StepShape
from stages.base import Stage
from xray.config import RunConfig
from xray.errors import DataError
from xray.training.step_shape import step_shape


class StepData:
    """A stream of steps, read one step ahead: `fetch` the next step, `take` what was fetched."""

    def __init__(self, stream: Generator[list[Loaded]]) -> None:
        self._stream = stream
        self._fetched: list[Loaded] = []

    def fetch(self) -> DataError | None:
        """Read the next step's micro-batches; returns the error that prevents it."""
        try:
            self._fetched = next(self._stream)
        except DataError as error:
            return error
        return None

    def take(self) -> list[Loaded]:
        """Hand over the fetched micro-batches, without keeping them."""
        loaded, self._fetched = self._fetched, []
        return loaded

    def close(self) -> None:
        """End the stream's workers, which would keep this process alive."""
        self._stream.close()


def decoding_metrics(loaded: Sequence[Loaded]) -> dict[str, float]:
    """Return this rank's decoding time in ms per sample by modality, and cache hit rate."""
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


def replaced_samples(loaded: Sequence[Loaded]) -> int:
    """Return the number of samples that could not be used."""
    return sum(len(item.bad) for item in loaded)


def training_stream(
    stage: Stage, config: RunConfig, plans: dict[str, SamplePlan], steps: range, pin: bool
) -> Generator[list[Loaded]]:
    """Yield the micro-batches of each training step, in order."""

    def shape(step: int) -> StepShape:
        return step_shape(stage, config.blocks, config.progress(step))

    overfit = config.debug.overfit_batch
    sampler = StepSampler(config.blocks, plans, shape, steps, same=overfit)
    seed, workers = None if overfit else config.seed, config.data.workers
    return iterate_steps(sampler, stage.transform, stage.collate, seed, workers, pin)


def validation_stream(
    stage: Stage, config: RunConfig, plans: dict[str, SamplePlan], shape: StepShape
) -> Generator[list[Loaded]]:
    """Yield the fixed validation samples as one step, without randomness."""
    sampler = StepSampler(config.validation, plans, lambda step: shape, range(1))
    workers = config.data.workers
    return iterate_steps(sampler, stage.transform, stage.collate, None, workers, pin=False)
