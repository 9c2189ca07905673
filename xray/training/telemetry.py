"""Measurements of the training loop: throughput, data waiting, memory, stragglers, hangs."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Sequence

import torch

from data_pipelines.stream.loader import Loaded
from stages.base import Stage, StageModule
from xray import dist
from xray.training.stragglers import Stragglers
from xray.training.throughput import Throughput
from xray.training.watchdog import Watchdog

log = logging.getLogger("xray")
DATA = "waiting for data"


class Telemetry:
    """Meters of a run's steps: `begin` a step, `mark` its phases, `end` it, `report` some."""

    def __init__(
        self, stage: Stage, module: StageModule, device: torch.device, watchdog: Watchdog
    ) -> None:
        self.device, self.watchdog = device, watchdog
        self.throughput = Throughput(stage, module, device)
        self.stragglers = Stragglers(module.towers, device)

    def begin(self, step: int) -> None:
        """Start a step with its forward and backward passes."""
        self.throughput.begin()
        self.stragglers.begin()
        self._step, self._waited = step, 0.0
        self._data_since: float | None = None
        self.mark("forward and backward")

    def mark(self, phase: str, factor: float = 1.0) -> None:
        """Enter a phase of the step, which may take factor times `train.hang_seconds`."""
        now = time.perf_counter()
        if self._data_since is not None:
            self._waited += now - self._data_since
        self._data_since = now if phase == DATA else None
        self.watchdog.at(phase, self._step, factor)

    def end_own_work(self) -> float:
        """End this rank's own part of the step; returns its seconds of waiting for data."""
        self.mark("reducing the metrics of the step")
        self.stragglers.end(self._waited)
        return self._waited

    def end(self, progress: float, waited: float, loaded: Sequence[Loaded]) -> dict[str, float]:
        """End a step and return the rates; waited: seconds for data, as a mean over ranks."""
        self.throughput.end(progress, waited, loaded)
        return self.throughput.rates()

    def report(self) -> dict[str, float]:
        """Return peak memory and the slowest rank's time, warn about a straggler, and start new
        rates. Collective."""
        self.throughput.restart()
        values = {"memory/gb": dist.max_over_ranks(_peak_memory(self.device), self.device) / 1e9}
        if dist.world_size() > 1:
            slowest, warning = self.stragglers.compare()
            values |= slowest
            if warning is not None:
                log.warning("step %d: %s", self._step + 1, warning)
        return values


def _peak_memory(device: torch.device) -> float:
    """Return the peak bytes of the device, or of this process if the device is the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
