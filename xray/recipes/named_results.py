"""Results of the named data sets of a recipe (eval.sets), which several artifacts may add to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xray import dist
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.set_runs import (
    SETS,
    EarlierFile,
    SetResults,
    SetRun,
    as_json,
    merged,
)
from xray.evaluation.set_tables import set_table, summary
from xray.evaluation.suites import SUITES
from xray.files import write_text

NAMED_SETS = "sets.json"  # in a recipe's folder


@dataclass
class NamedResults:
    """Results of all artifacts of a recipe so far; a later run takes the finished ones."""

    out: Path
    results: SetResults = field(default_factory=dict)

    def evaluate(self, evaluator: Evaluator, suites: Sequence[str]) -> None:
        """Run these suites of the sets, as rank 0."""
        path = self.out / NAMED_SETS
        known, before = EarlierFile(path).sets(), self.results

        def save(found: SetResults) -> None:
            self.results = merged(before, found)
            write_text(path, json.dumps({SETS: as_json(merged(known, self.results))}, indent=1))

        save(SetRun(evaluator, only=frozenset(suites)).evaluate(known, save))

    def finish(self) -> None:
        """Write the file with the means over sets, and print the table, as rank 0."""
        if not dist.is_main():
            return
        if self.results:
            facts = {SETS: as_json(self.results), **summary(self.results)}
            write_text(self.out / NAMED_SETS, json.dumps(facts, indent=1))
            set_table(self.results).print()
        else:
            (self.out / NAMED_SETS).unlink(missing_ok=True)


def suites_by_stage(offers: Mapping[str, frozenset[str]]) -> dict[str, list[str]]:
    """Return the suites of named sets that the artifact of each stage runs: the last that can."""
    last = {
        suite.name: stage for stage in offers for suite in SUITES if suite.needs <= offers[stage]
    }
    return {stage: [name for name in last if last[name] == stage] for stage in offers}
