"""How fast training goes: rates over the time since the last logged line.

What validation, logging and saving take is not in them. `data/wait` is the share of that time that
went into waiting for data, the mean over ranks; `memory/gb` the most that a rank has held so far.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Any

import torch

from data_pipelines.stream.loader import Loaded
from stages.base import Stage
from xray import dist
from xray.config import RunConfig, TowerOptim
from xray.config.schedule import value_at
from xray.models.flops import linear_macs
from xray.training.gpu_specs import gpu_of

# Not a metric's value but a clock's or a meter's: other in every run.
MEASURED = ("seconds", "samples/s", "tokens/s", "mfu", "memory/gb")


class Pace:
    """Adds up steps until `restart`.

    Model FLOPs are three forwards of what is trained and one of what is held still: of the vision
    side as `Stage.macs` counts it, and of the linear layers of a text tower. What is computed
    twice, in a gradient cache or by checkpointing, counts once.
    """

    def __init__(self, stage: Stage, module: Any, device: torch.device) -> None:
        self.stage, self.device = stage, device
        self.config: RunConfig = stage.config
        self.peak: float | None = None  # FLOP/s, where it is known
        if device.type == "cuda":
            gpu = gpu_of(torch.cuda.get_device_name(device))
            self.peak = None if gpu is None else gpu.peak(self.config.train.precision)
        self.text_macs, self.trained = 0, 0.0
        if "text" in module.towers:
            self.text_macs = linear_macs(module.towers["text"])
            self.trained = linear_macs(module.towers["text"], trained=True) / self.text_macs
        self.restart()

    def restart(self) -> None:
        self.samples = self.tokens = 0
        self.flops = self.seconds = self.waited = 0.0

    def begin(self) -> None:
        """A step begins."""
        self.mark = time.perf_counter()

    def end(self, progress: float, waited: float, loaded: Sequence[Loaded]) -> None:
        """A step is done, of these micro-batches, which had to be waited for some seconds."""
        self.seconds += time.perf_counter() - self.mark
        self.waited += waited
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
            macs = dist.world_size() * read * self.text_macs  # the ranks read nearly as much
            self.flops += 2 * macs * _forwards(self.trained, self.config.optim.text, progress)

    def rates(self) -> dict[str, float]:
        """Of all ranks together, since `restart`."""
        seconds = max(self.seconds, 1e-9)
        values = {"samples/s": self.samples / seconds, "data/wait": min(1.0, self.waited / seconds)}
        if self.tokens:
            values["tokens/s"] = self.tokens / seconds
        if self.peak is not None:
            values["mfu"] = self.flops / seconds / (self.peak * dist.world_size())
        return values

    def memory(self) -> dict[str, float]:
        """Collective."""
        if self.device.type == "cuda":
            held = float(torch.cuda.max_memory_allocated(self.device))
        else:
            held = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"memory/gb": dist.max_over_ranks(held, self.device) / 1e9}


def _forwards(trained: float, tower: TowerOptim, progress: float) -> float:
    """What a step of a tower costs, in forwards: one more to go back through it, and one for the
    gradients of all weights, or of the share that is trained."""
    return 1.0 if not trained or progress < tower.freeze else 2.0 + trained
