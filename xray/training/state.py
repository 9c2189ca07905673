"""Training state that a checkpoint keeps beside the engine's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipelines.stream.quarantine import Entry

HORIZON = 100  # steps that the running mean of the loss covers
FILE_BYTES = 1 << 29  # most bytes in a checkpoint's file, except for larger parameters
WARM_UP = 20  # steps before spikes are detected


@dataclass
class LossStatistics:
    """Running mean and variance of the training loss, used to detect spikes."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0
    spikes: int = 0  # consecutive ones, up to now

    def add(self, loss: float) -> None:
        """Update mean and variance with a step's loss."""
        share = max(1 / HORIZON, 1 / (self.steps + 1))  # the plain mean at first
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference * difference)
        self.steps += 1

    def deviation(self, loss: float) -> float:
        """Return how far a loss is above the mean, in standard deviations.

        The standard deviation counts as at least 1 % of the mean.
        """
        if self.steps < WARM_UP:
            return 0.0
        return (loss - self.mean) / max(self.variance**0.5, 0.01 * abs(self.mean), 1e-12)


@dataclass
class TrainState:
    """Training state saved beside the engine's. Data position and random draws derive from it."""

    step: int = 0  # optimizer steps done
    samples: int = 0
    seconds: float = 0.0  # spent training
    bad: dict[str, int] = field(default_factory=dict)  # replaced samples, by cause
    quarantine: list[Entry] = field(default_factory=list)  # samples that are not tried again
    world: int = 1
    zero_stage: int = 0
    score: float | None = None  # the metric `train.best_by` at this step
    level: LossStatistics = field(default_factory=LossStatistics)  # of the loss
    logged: str = ""  # sha256 of metrics.jsonl up to this step; "" in older checkpoints

    def to_json(self) -> dict[str, Any]:
        """Return the contents of state.json; the quarantine has its own file."""
        values = asdict(self)
        del values["quarantine"]
        return values
