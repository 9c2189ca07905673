"""Metrics and events of a step: reduced over ranks on the device, read by the host once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xray import dist
from xray.errors import XrayError


@dataclass(frozen=True)
class Events:
    """Events of a step on this rank, or of all ranks after `ReducedStep.read`."""

    preempted: bool = False  # a signal asked to save and stop
    failure: XrayError | None = None  # reading the next step's data failed
    replaced: int = 0  # samples that could not be used
    waited: float = 0.0  # seconds of waiting for data
    writing: bool = False  # a thread writes a checkpoint

    def agreed(self, device: torch.device) -> Events:
        """Combine the events of all ranks; raises a failure of any rank on all. Collective."""
        events, _ = ReducedStep(self, {}, device).read()
        return events


class ReducedStep:
    """A step's events and metrics as sums over ranks, on the device: the step's one all-reduce.

    The host is free until `read`. Values that are equal on all ranks are added by `append`.
    """

    def __init__(self, events: Events, metrics: Mapping[str, Tensor], device: torch.device) -> None:
        self._own = events
        self._names, self._cuda = sorted(metrics), device.type == "cuda"
        failed = events.failure is not None
        facts = [events.preempted, failed, events.replaced, events.waited, events.writing]
        self._facts = len(facts)
        host = torch.tensor(facts, dtype=torch.float64, pin_memory=self._cuda)
        sums = [host.to(device, non_blocking=True)]
        if metrics:
            sums.append(
                torch.stack([metrics[name].reshape(()).float() for name in self._names]).double()
            )
        self._values = dist.sum_over_ranks(torch.cat(sums)) / dist.world_size()
        self._copied: torch.cuda.Event | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Return a metric's mean over ranks [0-d, on the device]."""
        return self._values[self._facts + self._names.index(name)]

    def append(self, name: str, value: Tensor) -> None:
        """Add a metric that is equal on all ranks [0-d, on the device or the host]."""
        self._names.append(name)
        value = value.to(self._values.device)
        self._values = torch.cat([self._values, value.reshape(1).double()])

    def copy_to_host(self) -> None:
        """Start the copy that `read` waits for."""
        if self._cuda:
            host = torch.empty_like(self._values, device="cpu", pin_memory=True)
            self._values = host.copy_(self._values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Wait until the device has made the step."""
        if self._copied is not None:
            self._copied.synchronize()

    def read(self) -> tuple[Events, dict[str, float]]:
        """Wait for the step and return events of all ranks and means of metrics.

        Raises a failure of any rank on all ranks.
        """
        self.wait()
        preempted, failed, replaced, waited, writing, *means = dist.to_host(self._values)
        if failed:
            dist.agree(self._own.failure)
        world = dist.world_size()
        events = Events(preempted > 0, None, round(replaced * world), waited, writing > 0)
        return events, dict(zip(self._names, means, strict=True))
