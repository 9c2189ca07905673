"""Shapes and micro-batches of training and validation steps on this rank."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing

import torch

from data_pipelines.shards.meter import Reading, add
from data_pipelines.shards.source import Source
from data_pipelines.stream.limits import check_limits
from data_pipelines.stream.loaded import Loaded, Replaced
from data_pipelines.stream.loader import StepLoader, iterate_steps, read_ahead
from data_pipelines.stream.sampling import (
    PART,
    SamplePlan,
    StepSampler,
    StepShape,
    micro_batches,
    within_budget,
)
from stages.base import Stage
from xray import dist
from xray.config import BlockConfig, RunConfig
from xray.config.schedule import steps_of, value_at
from xray.errors import ConfigError, DataError
from xray.training.gradient_cache import split_blocks

log = logging.getLogger("xray")


def step_shape(stage: Stage, blocks: list[BlockConfig], progress: float) -> StepShape:
    """Return sizes and this rank's micro-batches of a step over blocks at a progress in [0, 1]."""
    data, world = stage.config.data, dist.world_size()
    resolution, frames = value_at(data.resolution, progress), value_at(data.frames, progress)
    sizes = [value_at(stage.config.train.micro_batch, progress)] * len(blocks)
    tokens = None
    if data.tokens_per_batch or data.weigh_blocks_by == "tokens":
        kinds = [data.sources[block.source].modality for block in blocks]
        tokens = [stage.tokens(frames if kind == "video" else 1, resolution) for kind in kinds]
    if tokens is not None and data.tokens_per_batch:
        sizes = [
            within_budget(block, world, each, data.tokens_per_batch)
            for block, each in zip(blocks, tokens, strict=True)
        ]
    weights = tokens if data.weigh_blocks_by == "tokens" else None
    micros = micro_batches(blocks, sizes, dist.rank(), world, weights)
    return StepShape(resolution, frames, micros)


def check_batches(stage: Stage, config: RunConfig) -> None:
    """Raise ConfigError for blocks of a wrong modality, or that cannot be split as configured.

    Warns about settings that have no effect in micro-batches as small as these.
    """
    for block in (*config.blocks, *config.validation):
        modality = config.data.sources[block.source].modality
        if modality not in stage.modalities:
            raise ConfigError(
                f"data.blocks: stage {stage.name} cannot use source {block.source!r} of modality "
                f"{modality}: leave it out of this stage's data.blocks"
            )
    if stage.spans_batch and config.data.views > 1:
        raise ConfigError(
            f"data.views={config.data.views}: stage {stage.name} compares the samples of a step, "
            "and would tell views of the same sample apart: set data.views to 1"
        )
    schedules = config.train.micro_batch, config.data.resolution, config.data.frames
    starts = sorted({start for schedule in schedules for start, _ in steps_of(schedule)})
    sizes = set[tuple[str, int]]()  # sources and rows of the micro-batches of training
    for start in starts:
        cut = step_shape(stage, config.blocks, start).micro
        step_shape(stage, config.validation, start)
        sizes |= {(micro.source, micro.stop - micro.start) for micro in cut}
    for source, rows in sorted(sizes):
        idle = config.without_effect(rows)
        if idle and dist.is_main():
            log.warning(
                "%s: no effect on source %s in micro-batches of %d, which contain a single sample; "
                "raise train.micro_batch, data.tokens_per_batch or the samples of the block",
                *(", ".join(idle), source, rows),
            )


def check_loading(stage: Stage, config: RunConfig, sources: Mapping[str, Source]) -> None:
    """Check that this machine lets the loader workers read ahead; raises ConfigError if not."""
    schedules = config.train.micro_batch, config.data.resolution, config.data.frames
    starts = sorted({start for schedule in schedules for start, _ in steps_of(schedule)})
    shards = [len(sources[block.source].manifest) for block in config.blocks]
    for start in starts:
        shape = step_shape(stage, config.blocks, start)
        pixels = 3 * shape.resolution**2  # bytes of an image or frame
        frames = [
            (micro.stop - micro.start)
            * (shape.frames if config.data.sources[micro.source].modality == "video" else 1)
            for micro in shape.micro
            if config.data.sources[micro.source].modality != "text"
        ]
        if frames:
            parts = sum(-(-count // PART) for count in frames)
            mean = pixels * sum(min(count, PART) for count in frames) // len(frames)
            ahead = read_ahead(config.data.workers, parts)
            check_limits(config.data.workers, mean, ahead, shards, dist.local_world_size())


class StepData:
    """A stream of steps, read one step ahead: `fetch` the next step into `loaded`.

    A step that cannot be read leaves the one before in its place: its ranks meet in collectives
    until all of them know of the failure.
    """

    def __init__(self, stream: Generator[list[Loaded]]) -> None:
        self._stream = stream
        self.loaded: list[Loaded] = []
        self.failure: DataError | None = None

    def fetch(self) -> DataError | None:
        """Read the next step's micro-batches; returns the error that prevents it."""
        if self.failure is None:
            try:
                self.loaded = next(self._stream)
            except DataError as error:
                self.failure = error
        return self.failure

    def close(self) -> None:
        """End the stream's workers, which would keep this process alive."""
        self._stream.close()


def decoding_metrics(loaded: Sequence[Loaded]) -> dict[str, float]:
    """Return this rank's decoding time in ms per sample by modality, and shares: cache hits, and
    images decoded on the GPU, if it decodes them."""
    total: Reading = {}
    for item in loaded:
        add(total, item.reading)
    values = {
        f"data/{name}_ms": 1e3 * seconds / times
        for name, (times, seconds) in total.items()
        if name in ("image", "video")
    }
    shares = {"data/cache_hits": ("hit", "miss"), "data/gpu_decoded": ("device", "fallback")}
    for name, counters in shares.items():
        one, other = (total.get(counter, (0, 0.0))[0] for counter in counters)
        if one + other:
            values[name] = one / (one + other)
    return values


def replaced_samples(loaded: Sequence[Loaded]) -> list[Replaced]:
    """Return this rank's samples that could not be used."""
    return [entry for item in loaded for entry in item.bad]


def training_stream(
    stage: Stage,
    config: RunConfig,
    plans: dict[str, SamplePlan],
    steps: range,
    device: torch.device,
) -> Generator[list[Loaded]]:
    """Yield the micro-batches of each training step on a device, in order."""

    def shape(step: int) -> StepShape:
        return step_shape(stage, config.blocks, config.progress(step))

    overfit = config.debug.overfit_batch
    sampler = StepSampler(config.blocks, plans, shape, steps, overfit, config.data.views)
    seed, workers = None if overfit else config.seed, config.data.workers
    pin, decoder = _use_of(device, config)
    loaded = iterate_steps(sampler, stage.transform, stage.collate, seed, workers, pin, decoder)
    return _arranged(stage, sampler, loaded, pin)


def _use_of(device: torch.device, config: RunConfig) -> tuple[bool, torch.device | None]:
    """Return whether to pin batches for a device, and the device if it decodes images."""
    return device.type == "cuda", device if config.data.decode == "gpu" else None


def _arranged(
    stage: Stage, sampler: StepSampler, stream: Generator[list[Loaded]], pin: bool
) -> Generator[list[Loaded]]:
    with closing(stream):
        for step, loaded in zip(sampler.steps, stream, strict=True):
            _arrange(stage, sampler.shape(step), loaded, pin)
            yield loaded


def _arrange(stage: Stage, shape: StepShape, loaded: Sequence[Loaded], pin: bool) -> None:
    """Let the stage arrange the micro-batches of split blocks that its loss spans."""
    for numbers in split_blocks(shape.micro, stage.contrasts).values():
        batches = stage.arrange([loaded[number].batch for number in numbers])
        for number, batch in zip(numbers, batches, strict=True):
            loaded[number].batch = batch
            if pin:
                loaded[number].pin_memory()


class ValidationData:
    """Fixed validation samples as one step, without randomness, read by workers that are kept."""

    def __init__(
        self,
        stage: Stage,
        config: RunConfig,
        plans: dict[str, SamplePlan],
        device: torch.device,
    ) -> None:
        self._shape: StepShape | None = None
        self._loader: StepLoader | None = None
        self._stage = stage
        self._pin, decoder = _use_of(device, config)
        sampler = StepSampler(config.validation, plans, self._shape_of, range(1))
        workers = config.data.workers
        given = sampler, stage.transform, stage.collate, None, workers
        self._settings = *given, self._pin, decoder

    def _shape_of(self, step: int) -> StepShape:
        assert self._shape is not None
        return self._shape

    def read(self, shape: StepShape) -> tuple[list[Loaded], DataError | None]:
        """Read the micro-batches in a shape, which may differ from the one before.

        Returns the error that prevents it, if there is one.
        """
        self._shape = shape
        if self._loader is None:
            self._loader = StepLoader(*self._settings)
        try:
            (loaded,) = self._loader
        except DataError as error:
            return [], error
        _arrange(self._stage, shape, loaded, self._pin)
        return loaded, None

    def close(self) -> None:
        """End the workers."""
        if self._loader is not None:
            self._loader.close()
