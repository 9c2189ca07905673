"""Detection of ranks that are slower than the others."""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

import torch
from torch import nn

from xray import dist

SLOW = 1.5  # times the median rank's time


class Stragglers:
    """Each rank's own time per step since the last comparison, and the slowest rank.

    A rank's own time is waiting for data and the forward passes of its towers: in the rest of a
    step ranks wait for each other, under ZeRO 3 also in forward passes.
    """

    def __init__(self, towers: nn.ModuleDict, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._steps = 0.0, 0
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
