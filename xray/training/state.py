"""Where a run's loss has been, and what lies far above it."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipelines.stream.quarantine import Entry

HORIZON, STEPS = 100, 20  # of the loss's moving mean; known before spikes are looked for


@dataclass
class Level:
    """Where the loss has been: moving mean and variance, over about HORIZON steps."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0
    spikes: int = 0  # in a row, up to now

    def add(self, loss: float) -> None:
        """Take up a step's loss."""
        share = max(1 / HORIZON, 1 / (self.steps + 1))  # the plain mean at first
        away = loss - self.mean
        self.mean += share * away
        self.variance = (1 - share) * (self.variance + share * away * away)
        self.steps += 1

    def above(self, loss: float) -> float:
        """How many standard deviations a loss lies above the mean; 0 before STEPS are known.

        The deviation counts as 1 % of the mean at least.
        """
        if self.steps < STEPS:
            return 0.0
        return (loss - self.mean) / max(self.variance**0.5, 0.01 * abs(self.mean), 1e-12)


@dataclass
class TrainState:
    """What a run needs besides the engine's state: the data stream and the randomness follow."""

    step: int = 0  # optimizer steps done
    samples: int = 0
    seconds: float = 0.0  # spent training
    bad: dict[str, int] = field(default_factory=dict)  # samples replaced, by cause
    quarantine: list[Entry] = field(default_factory=list)  # samples not to be tried again
    world: int = 1
    zero_stage: int = 0
    score: float | None = None  # the metric `train.best_by` at this step
    level: Level = field(default_factory=Level)  # of the losses so far
