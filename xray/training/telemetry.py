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

from data_pipelines.stream.loaded import Loaded
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
        self._waits, self._waiting = Intervals(device), False
        watchdog.passes = self.stragglers.finished

    def begin(self, step: int) -> None:
        """Start a step with its forward and backward passes."""
        self.throughput.begin()
        self.stragglers.begin()
        self._step = step
        self.mark("forward and backward")

    def mark(self, phase: str, factor: float = 1.0) -> None:
        """Enter a phase of the step, which may take `factor` times `train.hang_seconds`."""
        if self._waiting:
            self._waits.end()
        self._waiting = phase == DATA
        if self._waiting:
            self._waits.begin()
        self.watchdog.at(phase, self._step, factor)

    def end_own_work(self) -> float:
        """End this rank's own part of the step; returns its seconds of waiting for data.

        A GPU that still computes while the host waits loses nothing: on CUDA these are the seconds
        for which it had nothing to do, of the steps that it has finished since the last call.
        """
        self.mark("reducing the metrics of the step")
        waited = self._waits.take()
        self.stragglers.end(waited)
        return waited

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


class Intervals:
    """Intervals of time: of this process on a CPU, of the present stream on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun: Any = None
        self._ended: list[tuple[Any, Any]] = []
        self._taken = 0

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Begin an interval."""
        self._begun = self._now()

    def end(self) -> None:
        """End the interval."""
        self._ended.append((self._begun, self._now()))

    def passed(self) -> int:
        """Return the number of intervals whose end the device has passed."""
        ended = list(self._ended)
        return self._taken + (sum(end.query() for _, end in ended) if self._cuda else len(ended))

    def take(self) -> float:
        """Return the seconds of the intervals that have passed since the last call."""
        number = self.passed() - self._taken
        done, self._ended = self._ended[:number], self._ended[number:]
        self._taken += number
        if self._cuda:
            return sum(begin.elapsed_time(end) for begin, end in done) / 1000
        return sum(end - begin for begin, end in done)


class Stragglers:
    """Each rank's own time per step since the last comparison, and the slowest rank.

    A rank's own time is waiting for data and the forward passes of its towers: in the rest of a
    step ranks wait for each other. Under ZeRO 3, they also wait in forward passes.
    """

    def __init__(self, towers: nn.ModuleDict, device: torch.device) -> None:
        self._passes = Intervals(device)
        self._seconds, self._steps = 0.0, 0
        self._in_step = False
        for tower in towers.values() if dist.world_size() > 1 else ():
            tower.register_forward_pre_hook(self._begin_forward)
            tower.register_forward_hook(self._end_forward)

    def _begin_forward(self, *_: Any) -> None:
        self._passes.begin()

    def _end_forward(self, *_: Any) -> None:
        if self._in_step:  # else it is a forward pass of validation
            self._passes.end()

    def finished(self) -> int:
        """Return the number of training's forward passes that the device has finished."""
        return self._passes.passed()

    def begin(self) -> None:
        """Count the forward passes that follow."""
        self._in_step = True

    def end(self, waited: float) -> None:
        """End a step that waited some seconds for data."""
        self._seconds += waited + self._passes.take()
        self._steps += 1
        self._in_step = False

    def compare(self) -> tuple[dict[str, float], str | None]:
        """Return the slowest rank's time over the median rank's, and a warning; collective."""
        self._seconds += self._passes.take()
        everyone = dist.gather_objects((self._seconds / max(1, self._steps), socket.gethostname()))
        self._seconds, self._steps = 0.0, 0
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
