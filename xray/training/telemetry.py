"""Measurements of the training loop: throughput, data waiting, memory, stragglers, hangs."""

from __future__ import annotations

import logging
import resource
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from data_pipelines.stream.loader import Loaded
from stages.base import Stage, StageModule
from xray import dist
from xray.training.throughput import Throughput
from xray.training.watchdog import Watchdog

log = logging.getLogger("xray")
DATA = "waiting for data"
SLOW = 1.5  # a straggler's time over the median rank's


class Telemetry:
    """Meters of a run's steps: `begin` a step, `mark` its phases, `end` it, `report` some."""

    def __init__(
        self, stage: Stage, module: StageModule, device: torch.device, watchdog: Watchdog
    ) -> None:
        self.device, self.watchdog = device, watchdog
        self.throughput = Throughput(stage, module, device)
        self.stragglers = Stragglers(module.towers, device)
        watchdog.passes = self.stragglers.finished

    def begin(self, step: int) -> None:
        """Start a step with its forward and backward passes."""
        self.throughput.begin()
        self.stragglers.begin()
        self._step, self._waited = step, 0.0
        self._data_since: float | None = None
        self.mark("forward and backward")

    def mark(self, phase: str, factor: float = 1.0) -> None:
        """Enter a phase of the step, which may take `factor` times `train.hang_seconds`."""
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

    def end(self, progress: float, loaded: Sequence[Loaded]) -> None:
        """End a step of these micro-batches."""
        self.throughput.end(progress, loaded)

    def rates(self, waited: float) -> dict[str, float]:
        """Return the rates; waited: a step's seconds of waiting for data, as a mean over ranks."""
        self.throughput.waited += waited
        return self.throughput.rates()

    def report(self) -> dict[str, float]:
        """Return peak memory and the slowest rank's time, and start new rates. Collective.

        Warns about a straggler.
        """
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


class Stragglers:
    """Each rank's own time per step since the last comparison, and the slowest rank.

    A rank's own time is waiting for data and the forward passes of its towers: in the rest of a
    step ranks wait for each other. Under ZeRO 3, they also wait in forward passes.
    """

    def __init__(self, towers: nn.ModuleDict, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._steps = 0.0, 0
        self._earlier = 0  # passes before the last comparison, on a CPU all
        self._in_step = False
        self._begun: Any = None
        self._passes: list[tuple[Any, Any]] = []  # CUDA events, read in `compare`
        for tower in towers.values() if dist.world_size() > 1 else ():
            tower.register_forward_pre_hook(self._begin_forward)
            tower.register_forward_hook(self._end_forward)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin_forward(self, *_: Any) -> None:
        self._begun = self._now()

    def _end_forward(self, *_: Any) -> None:
        if not self._in_step:  # a forward pass of validation
            return
        if self._cuda:
            self._passes.append((self._begun, self._now()))
        else:
            self._seconds += self._now() - self._begun
            self._earlier += 1

    def finished(self) -> int:
        """Return the number of training's forward passes that the device has finished."""
        return self._earlier + sum(end.query() for _, end in list(self._passes))

    def begin(self) -> None:
        """Count the forward passes that follow."""
        self._in_step = True

    def end(self, waited: float) -> None:
        """End a step that waited some seconds for data."""
        self._seconds += waited
        self._steps += 1
        self._in_step = False

    def compare(self) -> tuple[dict[str, float], str | None]:
        """Return the slowest rank's time over the median rank's, and a warning; collective."""
        self._seconds += sum(begin.elapsed_time(end) for begin, end in self._passes) / 1000
        everyone = dist.gather_objects((self._seconds / max(1, self._steps), socket.gethostname()))
        self._earlier += len(self._passes)
        self._seconds, self._steps, self._passes = 0.0, 0, []
        times = [seconds for seconds, _ in everyone]
        slowest = max(range(len(times)), key=times.__getitem__)
        median = statistics.median_low(times)
        ratio = times[slowest] / max(median, 1e-9)
        warning = None
        if ratio > SLOW:
            warning = (
                f"rank {slowest} ({everyone[slowest][1]}) delays the others: it needs "
                f"{times[slowest]:.2f} s per step for its own data and forward passes, the median "
                f"rank {median:.2f} s"
            )
        return {"rank/slowest": ratio}, warning
