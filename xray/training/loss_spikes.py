"""Detection of loss spikes: logged, recorded, and skipped if train.spikes=skip."""

from __future__ import annotations

import json
import logging
from typing import Any

from xray import dist
from xray.errors import DataError, TrainingError, brief
from xray.training.run import Run, samples_of
from xray.training.state import TrainState

log = logging.getLogger("xray")
MOST_IN_A_ROW = 10  # consecutive steps that may be skipped


class SpikeDetector:
    """Compares each loss with the run's loss statistics; every rank does so with equal numbers."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run, self.state = run, state
        self.path = run.out / "spikes.jsonl"

    def skips(self, loss: float) -> bool:
        """Add the loss of the coming update to the statistics; returns True to skip the update.

        A spike that is not skipped counts as a loss at the threshold. Raises TrainingError for too
        many skipped steps in a row.
        """
        train, losses = self.run.config.train, self.state.level
        deviation = losses.deviation(loss)
        if train.spikes == "ignore" or deviation <= train.spike:
            losses.add(loss)
            losses.spikes = 0
            return False
        skip = train.spikes == "skip"
        if dist.is_main():
            self._report(loss, deviation, skip)
        if not skip:
            losses.add(losses.mean + train.spike * (loss - losses.mean) / deviation)
            return False
        losses.spikes += 1
        if losses.spikes > MOST_IN_A_ROW:
            raise TrainingError(
                f"step {self.state.step + 1}: the loss of {losses.spikes} steps in a row is more "
                f"than train.spike={train.spike} standard deviations above its mean "
                f"{losses.mean:.4g}: these are not spikes, the loss has changed; the steps are in "
                f"{self.path}, the checkpoints are kept"
            ).on_all_ranks()
        return True

    def _report(self, loss: float, deviation: float, skip: bool) -> None:
        """Log a spike and append it, with its samples, to spikes.jsonl."""
        state, mean = self.state, self.state.level.mean
        log.warning(
            "step %d: the loss %.4g is %.1f standard deviations above its mean %.4g%s; the samples "
            "are in %s",
            state.step + 1, loss, deviation, mean, ": the step is skipped" if skip else "",
            self.path,
        )  # fmt: skip
        record: dict[str, Any] = {"step": state.step + 1, "loss": loss, "mean": mean}
        record |= {"above": deviation, "skipped": skip}
        try:
            record["samples"] = samples_of(self.run, state.step)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except (DataError, OSError) as error:  # on rank 0 only: the other ranks continue
            log.warning("%s cannot be written: %s", self.path, brief(error))
