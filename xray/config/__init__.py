"""Settings of a run: typed dataclasses, filled from yaml layers and `key=value`, then checked.

A field is *identity* (it changes the result, is hashed, and must be equal when a run is resumed)
unless it is declared with `runtime()`: workers, micro-batch, ZeRO stage, logging, saving, paths.
"""

from xray.config.data import BlockConfig, DataConfig, SourceConfig
from xray.config.identity import runtime
from xray.config.model import Features, ModelConfig, Precision, TextConfig
from xray.config.run import RunConfig, dump
from xray.config.training import (
    DebugConfig,
    OptimConfig,
    TowerOptim,
    TrainConfig,
    VisionOptim,
    ZeroConfig,
)
from xray.errors import nearest

__all__ = [
    "BlockConfig",
    "DataConfig",
    "DebugConfig",
    "Features",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "RunConfig",
    "SourceConfig",
    "TextConfig",
    "TowerOptim",
    "TrainConfig",
    "VisionOptim",
    "ZeroConfig",
    "dump",
    "nearest",
    "runtime",
]
