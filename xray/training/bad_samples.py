"""Samples that could not be used: counted by cause, listed, quarantined, and limited."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from data_pipelines.stream import quarantine
from data_pipelines.stream.loaded import Replaced
from data_pipelines.stream.quarantine import Entry
from data_pipelines.stream.sampling import SamplePlan
from data_pipelines.text.captions import NO_CAPTION, leave_out_uncaptioned
from data_pipelines.text.names import with_key
from xray import dist
from xray.errors import DataError
from xray.training.state import TrainState

log = logging.getLogger("xray")
GRACE = 1000  # smallest number of samples to which data.max_bad_fraction applies
WARNED = 20  # samples named in the log; the file lists all


class BadSamples:
    """Account of a run's bad samples in its state and in `bad_samples.jsonl`, on every rank."""

    def __init__(self, out: Path, state: TrainState, plans: Mapping[str, SamplePlan]) -> None:
        self.path, self.state, self.plans = out / "bad_samples.jsonl", state, plans
        self.shards: Counter[str] = Counter()
        quarantine.exclude(state.quarantine, plans)

    def account(self, mine: Sequence[Replaced], read: int, limit: float) -> None:
        """Add the samples that a step replaced, on this rank and the others. Collective.

        Raises DataError if more than the fraction `limit` of the run's read samples was replaced.
        """
        everyone = [entry for entries in dist.gather_objects(list(mine)) for entry in entries]
        bad = self.state.bad
        for entry in everyone:
            bad[entry.cause] = bad.get(entry.cause, 0) + 1
            self.shards[f"{entry.source}/{entry.shard}"] += 1
            if sum(bad.values()) <= WARNED:
                shown = with_key(entry.name, entry.key)
                log.warning("replaced %r of %s: %s", shown, entry.shard, entry.cause)
                if sum(bad.values()) == WARNED:
                    log.warning("further bad samples are only listed in %s", self.path)
        self._keep(everyone)
        if sum(bad.values()) > limit * max(read, GRACE):
            causes = ", ".join(f"{cause}: {count}" for cause, count in sorted(bad.items()))
            names = ", ".join(f"{shard} ({n})" for shard, n in self.shards.most_common(3))
            mend = f": {leave_out_uncaptioned()}" if NO_CAPTION in bad else ""
            raise DataError(
                f"{sum(bad.values())} of {read} samples cannot be used ({causes}), more than "
                f"data.max_bad_fraction={limit}; most are in {names}; all are listed in "
                f"{self.path}{mend}"
            ).on_all_ranks()

    def _keep(self, everyone: Sequence[Replaced]) -> None:
        """Extend the quarantine, and the file on rank 0."""
        known = set(self.state.quarantine)
        new = {Entry(e.source, e.shard, e.key, e.cause) for e in everyone if e.quarantine} - known
        fresh = sorted(new, key=lambda entry: (entry.source, entry.shard, entry.key))
        self.state.quarantine += fresh
        # It opens the shard's index, which may fail on one rank only.
        dist.together(lambda: quarantine.exclude(fresh, self.plans))

        def write() -> None:
            with self.path.open("a", encoding="utf-8") as file:
                for entry in everyone:
                    file.write(json.dumps({"step": self.state.step + 1, **asdict(entry)}) + "\n")

        dist.on_main(write)
