"""What a step is made of on this rank: its samples' sizes, its micro-batches, their stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from data_pipelines.loader import Loaded, iterate_steps
from data_pipelines.sampling import (
    SamplePlan,
    StepSampler,
    StepShape,
    make_plans,
    micro_batches,
)
from data_pipelines.shards import Source
from stages.base import Stage
from xray import dist
from xray.config import BlockConfig, RunConfig
from xray.errors import ConfigError
from xray.schedule import steps_of, value_at


def step_shape(config: RunConfig, blocks: list[BlockConfig], progress: float) -> StepShape:
    """Sizes and micro-batches of a step of these blocks at a progress."""
    data, micro_batch = config.data, value_at(config.train.micro_batch, progress)
    cut = micro_batches(blocks, micro_batch, dist.rank(), dist.world_size())
    return StepShape(value_at(data.resolution, progress), value_at(data.frames, progress), cut)


def check_batches(stage: type[Stage], config: RunConfig) -> None:
    """Raise ConfigError for blocks that cannot be cut as asked, at any progress."""
    world = dist.world_size()
    for blocks in (config.blocks, config.validation):
        for start, size in steps_of(config.train.micro_batch):
            for micro in step_shape(config, blocks, start).micro:
                block = blocks[micro.block]
                whole = (micro.stop - micro.start) * world == block.samples
                if stage.spans_batch and not whole:
                    raise ConfigError(
                        f"stage {stage.name} compares all {block.samples} samples of block "
                        f"{block.source!r}: train.micro_batch={size} x {world} processes must "
                        f"reach {block.samples}; set train.micro_batch=0 or use a smaller block"
                    )


def training_stream(
    stage: Stage, config: RunConfig, plans: dict[str, SamplePlan], steps: range, pin: bool
) -> Iterator[list[Loaded]]:
    """The micro-batches of each step, in order."""

    def shape(step: int) -> StepShape:
        return step_shape(config, config.blocks, config.progress(step))

    sampler = StepSampler(config.blocks, plans, shape, steps)
    workers = config.data.workers
    return iterate_steps(sampler, stage.transform, stage.collate, config.seed, workers, pin)


def validation_stream(
    stage: Stage, config: RunConfig, sources: Mapping[str, Source], shape: StepShape
) -> Iterator[list[Loaded]]:
    """One step: the fixed validation samples, without randomness."""
    blocks = config.validation
    plans = make_plans(blocks, dict(sources), config.data, config.seed)
    sampler = StepSampler(blocks, plans, lambda step: shape, range(1))
    workers = config.data.workers
    return iterate_steps(sampler, stage.transform, stage.collate, None, workers, pin=False)
