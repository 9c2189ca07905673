"""Result of a training step's passes, and the agreement of all ranks on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from xray import dist
from xray.errors import XrayError


@dataclass(frozen=True)
class StepResult:
    """Metrics and events of a step: of this rank, or after `agreed` of all ranks."""

    metrics: dict[str, float] = field(default_factory=dict)
    preempted: bool = False  # a signal asked to save and stop
    failure: XrayError | None = None  # reading the next step's data failed
    replaced: int = 0  # samples that could not be used
    waited: float = 0.0  # seconds of waiting for data

    def agreed(self, device: torch.device) -> StepResult:
        """Average metrics and waiting over ranks, and combine events: the step's one all-reduce.

        Raises a failure of any rank on all ranks.
        """
        names = sorted(self.metrics)
        events = [self.preempted, self.failure is not None, self.replaced]
        numbers = [*events, self.waited, *(self.metrics[name] for name in names)]
        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        preempted, failed, replaced, waited, *values = dist.sum_over_ranks(sums).tolist()
        if failed:
            dist.agree(self.failure)
        world = dist.world_size()
        means = {name: value / world for name, value in zip(names, values, strict=True)}
        return StepResult(means, preempted > 0, None, int(replaced), waited / world)
