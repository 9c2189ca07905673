"""Shape of a training step: samples, frames and resolution of each block."""

from __future__ import annotations

from data_pipelines.stream.sampling import StepShape, micro_batches, within_budget
from stages.base import Stage
from xray import dist
from xray.config import BlockConfig, RunConfig
from xray.config.schedule import steps_of, value_at
from xray.errors import ConfigError


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
    """Raise ConfigError for blocks of a wrong modality, or that cannot be split as configured."""
    for block in (*config.blocks, *config.validation):
        modality = config.data.sources[block.source].modality
        if modality not in stage.modalities:
            raise ConfigError(
                f"data.blocks: stage {stage.name} cannot use source {block.source!r} of modality "
                f"{modality}: leave it out of this stage's data.blocks"
            )
    schedules = config.train.micro_batch, config.data.resolution, config.data.frames
    starts = sorted({start for schedule in schedules for start, _ in steps_of(schedule)})
    for blocks in (config.blocks, config.validation):
        for start in starts:
            step_shape(stage, blocks, start)
