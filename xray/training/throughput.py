"""Throughput of training since the last logged line, without validation, logging and saving."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from data_pipelines.stream.loaded import Loaded
from stages.base import Stage, StageModule
from stages.tuning import reach
from xray import dist
from xray.config import RunConfig
from xray.config.schedule import value_at
from xray.models.flops import linear_macs
from xray.training.gpu_specs import gpu_of


class Throughput:
    """Sums of samples, tokens, FLOPs and seconds since `restart`.

    Model FLOPs are three forwards of each trained part and one of each frozen part. The parts are
    the vision tower, as `Stage.macs` counts it, and the linear layers of a text tower. Work
    that is repeated, in a gradient cache or by activation checkpointing, counts once. Blocks of a
    tower count as equal, and a decoder as the vision tower, if a part of it is trained.
    """

    def __init__(self, stage: Stage, module: StageModule, device: torch.device) -> None:
        self.stage = stage
        self.config: RunConfig = stage.config
        self.peak: float | None = None  # FLOP/s of the device, if known
        if device.type == "cuda":
            gpu = gpu_of(torch.cuda.get_device_name(device))
            self.peak = None if gpu is None else gpu.peak(self.config.train.precision)
        self.text_macs, self.forwards = 0, {"vision": 1.0, "text": 1.0}
        if "text" in module.towers:
            self.text_macs = linear_macs(module.towers["text"])
        for name, tower in module.towers.items():
            self.forwards[name] = _forwards_of(tower)
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
                self.flops += 2 * macs * self._forwards("vision", progress)
        if self.peak is not None and self.text_macs:
            texts = [item.batch["input_ids"] for item in loaded if "input_ids" in item.batch]
            read = sum(ids.numel() for ids in texts)
            macs = dist.world_size() * read * self.text_macs  # ranks read about as much each
            self.flops += 2 * macs * self._forwards("text", progress)

    def _forwards(self, tower: str, progress: float) -> float:
        """Return a tower's cost per step in forwards at a progress."""
        frozen = progress < getattr(self.config.optim, tower).frozen_until
        return 1.0 if frozen else self.forwards[tower]

    def rates(self) -> dict[str, float]:
        """Return the rates of all ranks together since `restart`."""
        seconds = max(self.seconds, 1e-9)
        values = {"samples/s": self.samples / seconds, "data/wait": min(1.0, self.waited / seconds)}
        if self.tokens:
            values["tokens/s"] = self.tokens / seconds
        if self.peak is not None:
            values["mfu"] = self.flops / seconds / (self.peak * dist.world_size())
        return values


def _forwards_of(tower: nn.Module) -> float:
    """Return a tower's cost per step in forwards.

    A backward costs one forward for the gradients of activations, of the blocks that they pass, and
    one for those of weights, of the weights that are trained.
    """
    return 1.0 + reach(tower) + linear_macs(tower, trained=True) / max(1, linear_macs(tower))
