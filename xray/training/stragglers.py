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


class Slowest:
    """How long each rank takes for its own part of the steps between two lines of the log.

    That is to wait for its data, and the forward passes of its towers: in all else of a step ranks
    wait for each other, so that a slow one takes no longer than they do. In ZeRO 3 they do so in
    the forward passes, too, where parameters are gathered, and data alone tell them apart.
    """

    def __init__(self, towers: nn.ModuleDict, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._steps = 0.0, 0
        self._in_step = False
        self._begun: Any = None
        self._passes: list[tuple[Any, Any]] = []  # of GPUs: events, read when they are past
        for tower in towers.values() if dist.world_size() > 1 else ():
            tower.register_forward_pre_hook(self._begin)
            tower.register_forward_hook(self._end)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *_: Any) -> None:
        self._begun = self._now()

    def _end(self, *_: Any) -> None:
        if not self._in_step:  # a validation's
            return
        if self._cuda:
            self._passes.append((self._begun, self._now()))
        else:
            self._seconds += self._now() - self._begun

    def start(self) -> None:
        self._in_step = True

    def stop(self, waited: float) -> None:
        """A step is done, whose data had to be waited for some seconds."""
        self._seconds += waited
        self._steps += 1
        self._in_step = False

    def compare(self) -> tuple[dict[str, float], str | None]:
        """The slowest rank's time over the median one's, and a warning; collective."""
        self._seconds += sum(begin.elapsed_time(end) for begin, end in self._passes) / 1000
        everyone = dist.gather_objects((self._seconds / max(1, self._steps), socket.gethostname()))
        self._seconds, self._steps, self._passes = 0.0, 0, []
        times = [seconds for seconds, _ in everyone]
        slowest = max(range(len(times)), key=times.__getitem__)
        usual = statistics.median_low(times)
        ratio = times[slowest] / max(usual, 1e-9)
        warning = None
        if ratio > SLOW:
            warning = (
                f"rank {slowest} ({everyone[slowest][1]}) holds up the others: "
                f"{times[slowest]:.2f} s a step for its own part, the median rank {usual:.2f} s"
            )
        return {"rank/slowest": ratio}, warning
