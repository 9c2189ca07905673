"""Losses far above where they have been: said, written down, and left out where that is asked."""

from __future__ import annotations

import json
import logging
from typing import Any

from xray import dist
from xray.errors import DataError, TrainingError, brief
from xray.training.run import Run, samples_of
from xray.training.state import TrainState

log = logging.getLogger("xray")
MOST_IN_A_ROW = 10  # steps that may be left out


class Spikes:
    """Watches a run's losses; every rank, with the same numbers."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run, self.state = run, state
        self.path = run.out / "spikes.jsonl"

    def found(self, loss: float) -> bool:
        """Take up the loss of the step that is about to be made; whether to leave the step out.

        A step that is left out does not move the level; one that is made moves it as far as a
        loss does that is just no spike. Raises TrainingError where too many are left out in a row.
        """
        train, level = self.run.config.train, self.state.level
        above = level.above(loss)
        if train.spikes == "ignore" or above <= train.spike:
            level.add(loss)
            level.spikes = 0
            return False
        skip = train.spikes == "skip"
        self._tell(loss, above, skip)
        if not skip:
            level.add(level.mean + train.spike * (loss - level.mean) / above)
            return False
        level.spikes += 1
        if level.spikes > MOST_IN_A_ROW:
            raise TrainingError(
                f"step {self.state.step + 1}: {level.spikes} steps in a row have a loss more than "
                f"train.spike={train.spike} deviations above its mean {level.mean:.4g}: this is no "
                f"spike; they are in {self.path}, the checkpoints are kept"
            ).on_all_ranks()
        return True

    def _tell(self, loss: float, above: float, skip: bool) -> None:
        if not dist.is_main():
            return
        state = self.state
        log.warning(
            "step %d: the loss, %.4g, is %.1f standard deviations above its mean of %.4g%s; the "
            "samples are in %s",
            state.step + 1, loss, above, state.level.mean,
            ": the step is left out" if skip else "", self.path,
        )  # fmt: skip
        facts: dict[str, Any] = {
            "step": state.step + 1,
            "loss": loss,
            "mean": state.level.mean,
            "above": above,
        }
        try:
            facts |= {"mean": state.level.mean, "skipped": skip}
            facts |= {"samples": samples_of(self.run, state.step)}
            with self.path.open("a") as file:
                file.write(json.dumps(facts) + "\n")
        except (DataError, OSError) as error:  # of this rank alone: the others go on
            log.warning("%s cannot be written: %s", self.path, brief(error))
