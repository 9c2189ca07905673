"""Settings of one stage's run; each stage adds its own section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf

from xray.config.data import BlockConfig, DataConfig, validate_data
from xray.config.identity import runtime
from xray.config.model import ModelConfig, TextConfig
from xray.config.training import DebugConfig, OptimConfig, TrainConfig, ZeroConfig
from xray.errors import ConfigError

R = TypeVar("R", bound="RunConfig")
Parent = tuple[str, dict[str, Any]]  # place and manifest of an artifact of `init_from`
LOG_EVERY, LINES = 10, 20  # steps between lines of metrics, and least number of lines


@dataclass
class RunConfig:
    """Settings of one stage's run. A stage subclasses it and adds its section."""

    stage: str = ""  # name of the stage; the command sets it
    seed: int = 0  # of initial weights, sample order, augmentation and all other random draws
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    zero: ZeroConfig = runtime(factory=ZeroConfig)
    init_from: list[str] = runtime(factory=list)  # artifacts, or released weights (xray import)
    license: str = runtime("")  # of the weights, for the model card: an SPDX identifier
    out: str = runtime("")  # folder of the run

    @property
    def blocks(self) -> list[BlockConfig]:
        """Blocks of a step whose modality is in `data.modalities`."""
        return self._enabled(self.data.blocks)

    @property
    def validation(self) -> list[BlockConfig]:
        """Validation blocks whose modality is in `data.modalities`."""
        return self._enabled(self.data.validation)

    def _enabled(self, blocks: list[BlockConfig]) -> list[BlockConfig]:
        sources, modalities = self.data.sources, self.data.modalities
        return [block for block in blocks if sources[block.source].modality in modalities]

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all blocks and ranks."""
        return sum(block.samples for block in self.blocks)

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage; ConfigError while only `train.epochs` is known."""
        if self.train.epochs is not None:
            raise ConfigError(
                f"the number of steps of train.epochs={self.train.epochs:g} follows from the data, "
                "which are not at hand: set data.root to them, or train.samples instead"
            )
        return max(1, round(self.train.samples / self.global_batch))

    def passes(self, sizes: Mapping[str, int], steps: int = 1) -> dict[str, float]:
        """Return the passes of `steps` steps over each source, by name; sizes: their samples."""
        drawn = {block.source: block.samples / self.data.views for block in self.blocks}
        return {name: steps * drawn[name] / sizes[name] for name in drawn if sizes.get(name)}

    def with_length(self: R, sizes: Mapping[str, int]) -> R:
        """Return the config with `train.samples` instead of `train.epochs`.

        An epoch is one pass over the source that takes the most steps for it, so that every sample
        of every source is seen. sizes: samples of the sources; the config stays as it is while one
        is missing.
        """
        passes = self.passes(sizes)
        if self.train.epochs is None or len(passes) < len(self.blocks):
            return self
        steps = math.ceil(round(self.train.epochs / min(passes.values()), 6))
        train = replace(self.train, samples=steps * self.global_batch, epochs=None)
        return replace(self, train=train)

    @property
    def log_every(self) -> int:
        """Steps from one line of metrics to the next, by default at least LINES lines in a run."""
        if self.train.log_every is None:
            return max(1, min(LOG_EVERY, self.steps // LINES))
        return self.train.log_every

    @property
    def zero_limit(self) -> Literal[0, 2, 3]:
        """Highest ZeRO stage that works with the other settings."""
        return 2 if self.train.compile else 3

    def progress(self, step: int) -> float:
        """Progress of the stage at a step, in (0, 1); every schedule is a function of it."""
        return (step + 0.5) / self.steps

    def without_effect(self, rows: int) -> list[str]:
        """Return settings that have no effect in a micro-batch of so many rows, as KEY=VALUE."""
        return []

    def from_parents(self, parents: Sequence[Parent]) -> dict[str, Any]:
        """Return settings, below those of the user, that the run takes from its parents."""
        return {}

    def validate(self) -> None:
        """Check the settings together; raises ConfigError that names the key to change."""
        validate_data(self.data)
        if not self.blocks:
            raise ConfigError(
                f"data.blocks has no block of data.modalities={self.data.modalities}: "
                "add a block, or widen data.modalities"
            )
        self.train.validate()
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be 0 or more")
        self.model.validate()
        self.optim.validate()
        self.zero.validate()
        if self.train.compile and self.zero.stage == 3:
            raise ConfigError(
                "train.compile=true does not work with zero.stage=3, which gathers the parameters "
                "of a layer inside the compiled code: set zero.stage to 2 or less"
            )
        if self.data.workers < 0:
            raise ConfigError(f"data.workers={self.data.workers} must be 0 or more")
        if self.data.tokens_per_batch < 0:
            raise ConfigError("data.tokens_per_batch must be 0 (off) or more")
        if self.data.tokens_per_batch and self.train.micro_batch != 0:
            raise ConfigError(
                "data.tokens_per_batch and train.micro_batch both set the size of a forward: "
                "leave one of them at 0"
            )


def dump(config: Any, path: Path) -> None:
    """Write the resolved config as yaml, which `xray train` accepts."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))), "utf-8")


def text_section(config: RunConfig) -> TextConfig | None:
    """Return the section of the LLM that a run reads; None for a stage without a text tower."""
    section = getattr(config, "text", None)
    return section if isinstance(section, TextConfig) else None
