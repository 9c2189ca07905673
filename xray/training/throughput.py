"""Throughput of training since the last logged line, without validation, logging and saving."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_pipelines.stream.loaded import Loaded
from stages.base import Stage, StageModule
from xray import dist
from xray.config import RunConfig, TowerOptim
from xray.config.schedule import value_at
from xray.models.flops import linear_macs


class Throughput:
    """Sums of samples, tokens, FLOPs and seconds since `restart`.

    Model FLOPs are three forwards of each trained part and one of each frozen part. The parts are
    the vision tower, as `Stage.macs` counts it, and the linear layers of a text tower. Work
    that is repeated, in a gradient cache or by activation checkpointing, counts once.
    """

    def __init__(self, stage: Stage, module: StageModule, device: torch.device) -> None:
        self.stage = stage
        self.config: RunConfig = stage.config
        self.peak: float | None = None  # FLOP/s of the device, if known
        if device.type == "cuda":
            gpu = gpu_of(torch.cuda.get_device_name(device))
            self.peak = None if gpu is None else gpu.peak(self.config.train.precision)
        self.text_macs, self.trained = 0, 0.0
        if "text" in module.towers:
            self.text_macs = linear_macs(module.towers["text"])
            self.trained = linear_macs(module.towers["text"], trained=True) / self.text_macs
        self.restart()

    def restart(self) -> None:
        """Start new sums."""
        self.samples = self.tokens = 0
        self.flops = self.seconds = self.waited = 0.0

    def begin(self) -> None:
        """Start the clock of a step."""
        self._begun = time.perf_counter()

    def end(self, progress: float, loaded: Sequence[Loaded]) -> None:
        """Add a step of these micro-batches."""
        self.seconds += time.perf_counter() - self._begun
        for block in self.config.blocks:
            video = self.config.data.sources[block.source].modality == "video"
            frames = value_at(self.config.data.frames, progress) if video else 1
            self.samples += block.samples
            self.tokens += block.samples * self.stage.visible(frames, progress)
            if self.peak is not None:
                macs = block.samples * self.stage.macs(frames, progress)
                self.flops += 2 * macs * _forwards(1.0, self.config.optim.vision, progress)
        if self.peak is not None and self.text_macs:
            read = sum(item.batch["input_ids"].numel() for item in loaded)
            macs = dist.world_size() * read * self.text_macs  # ranks read about as much each
            self.flops += 2 * macs * _forwards(self.trained, self.config.optim.text, progress)

    def rates(self) -> dict[str, float]:
        """Return the rates of all ranks together since `restart`."""
        seconds = max(self.seconds, 1e-9)
        values = {"samples/s": self.samples / seconds, "data/wait": min(1.0, self.waited / seconds)}
        if self.tokens:
            values["tokens/s"] = self.tokens / seconds
        if self.peak is not None:
            values["mfu"] = self.flops / seconds / (self.peak * dist.world_size())
        return values


def _forwards(trained: float, tower: TowerOptim, progress: float) -> float:
    """Return a tower's cost per step in forwards; trained: share of weights with gradients.

    A backward costs one forward for the gradients of activations, and one for those of weights.
    """
    return 1.0 if not trained or progress < tower.freeze else 2.0 + trained


@dataclass(frozen=True)
class Gpu:
    """Memory of a device in GB, and its dense TFLOP/s (without sparsity) in bf16 and fp32.

    The fp32 value is that of the CUDA cores: torch leaves tf32 off in matrix products, and
    `dist.choose_device` switches it off in cuDNN.
    """

    memory: float
    bf16: float
    fp32: float

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s in a precision (`bf16` or `fp32`)."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


GPUS = {
    "a100": Gpu(80, 312, 19.5),
    "a100-40gb": Gpu(40, 312, 19.5),
    "h100": Gpu(80, 989, 67),
    "h100-pcie": Gpu(80, 756, 51),
    "h100-nvl": Gpu(94, 835, 60),
    "h200": Gpu(141, 989, 67),
    "gh200": Gpu(96, 989, 67),
    "b200": Gpu(180, 2250, 75),
    "l4": Gpu(24, 121, 30.3),
    "l40s": Gpu(48, 362, 91.6),
    "rtx-4090": Gpu(24, 165, 82.6),
}


def gpu_of(name: str) -> Gpu | None:
    """Find a device by the name it reports, as "NVIDIA H100 80GB HBM3"; None if unknown."""
    words = set(re.split(r"[\s-]+", name.lower()))
    matching = [key for key in GPUS if words.issuperset(key.split("-"))]
    return GPUS[max(matching, key=len)] if matching else None
