"""Evaluation of mixtures, one after another, and the choice of one of them."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from xray.artifacts.artifact import Artifact
from xray.config.identity import differences
from xray.errors import ConfigError
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.suites import suite_named
from xray.files import write_text
from xray.merging.artifact import write_mixture
from xray.merging.frozen_text import RememberingTower, Vectors
from xray.merging.measures import mean_of, shown_measures, with_interval
from xray.merging.mixtures import Mixture, soup
from xray.records import read_record
from xray.words import duration

log = logging.getLogger("xray")
FILE = "merge.json"  # results of all mixtures
CANDIDATE = "candidate"  # folder of the mixture that is being evaluated
Results = dict[str, dict[str, float]]  # of a mixture, by suite


@dataclass(frozen=True)
class Judge:
    """The suites that mixtures are evaluated with, and their data."""

    suites: Sequence[str]
    config: EvalConfig
    root: str  # of the data sets
    workers: int
    device: torch.device
    vectors: Vectors | None = None  # those known, if all artifacts have the same text tower

    def evaluate(self, artifact: Artifact, suites: Sequence[str]) -> Results:
        """Run suites on an artifact."""
        opened = Evaluator.open(artifact, self.config, self.root, self.workers, self.device)
        encoder: Any = opened.sets.encoder
        if self.vectors is not None and hasattr(encoder, "text"):
            encoder.text = RememberingTower(encoder.text, self.vectors)
        return {name: dict(measures) for name, measures in opened.each(suites)}

    def settings(self) -> dict[str, Any]:
        """Return all that results depend on, besides the artifact: JSON values by section."""
        filled: Any = self.config.filled()
        config = asdict(filled)
        suites = [suite_named(name) for name in self.suites]
        names = {own.name for suite in suites for own in (suite, *suite.reads)}
        found = {name: config[name] for name in ("views", "precision", *sorted(names))}
        return dict(json.loads(json.dumps({**found, "root": self.root})))


@dataclass
class Row:
    """Results of one mixture in the file."""

    name: str
    weights: list[float]
    results: Results


@dataclass
class Stored:
    """Contents of the file."""

    artifacts: list[dict[str, str]]  # path and hash of the manifest
    settings: dict[str, Any]  # of the evaluation
    mixtures: list[Row] = field(default_factory=list)
    chosen: dict[str, Any] | None = None


class Search:
    """Results of mixtures, kept in a file of the folder `out`, from which a second call goes on.

    by: measures, each SUITE.MEASURE, whose mean chooses. Raises ConfigError if the file has results
    of other artifacts or with other settings.
    """

    def __init__(
        self, artifacts: Sequence[Artifact], judge: Judge, out: Path, by: Sequence[str] = ()
    ) -> None:
        self.artifacts, self.judge, self.out, self.by = artifacts, judge, out, by
        self.results: dict[tuple[float, ...], Results] = {}
        self.stored = Stored(
            [{"path": a.origin, "manifest": a.digest} for a in artifacts], judge.settings()
        )
        if not (out / FILE).is_file():
            return
        earlier = read_record(out / FILE, Stored, advice="; delete it")
        mine = self.stored
        both = earlier.settings.keys() & mine.settings.keys()
        lines = differences(
            {"artifact": [own["manifest"][:12] for own in earlier.artifacts]}
            | {key: earlier.settings[key] for key in both},
            {"artifact": [own["manifest"][:12] for own in mine.artifacts]}
            | {key: mine.settings[key] for key in both},
        )
        if lines:
            raise ConfigError(
                f"{out / FILE} has results of another merge ({lines[0]}): choose another --out, or "
                "delete that file"
            )
        mine.settings = {**earlier.settings, **mine.settings}
        mine.mixtures = earlier.mixtures
        self.results = {tuple(row.weights): row.results for row in earlier.mixtures}

    def measure(self, mixtures: Sequence[Mixture], most: int = 0) -> None:
        """Run the suites that mixtures have no results of; log each mixture with an estimate.

        most: how many mixtures there may be, for the estimate, if more calls follow.
        """
        due = [mixture for mixture in mixtures if self._missing(mixture)]
        began, total = time.monotonic(), max(most, len(due))
        for number, mixture in enumerate(due, start=1):
            missing = self._missing(mixture)
            own = self.results.setdefault(mixture.weights, {})
            own |= self._evaluate(mixture, missing)
            rows = {tuple(row.weights): row for row in self.stored.mixtures}
            rows[mixture.weights] = Row(mixture.name, list(mixture.weights), own)
            self.save([*rows.values()])
            seconds = (time.monotonic() - began) / number * (total - number)
            rest = f"; about {duration(seconds)} left" if total > number else ""
            self.value(mixture)  # raises after the first evaluation, if there is no such measure
            log.info("mixture %s: %s%s", mixture.name, self._told(mixture), rest)

    def _missing(self, mixture: Mixture) -> list[str]:
        done = self.results.get(mixture.weights, {})
        return [suite for suite in self.judge.suites if suite not in done]

    def _evaluate(self, mixture: Mixture, suites: Sequence[str]) -> Results:
        if len(mixture.members) == 1:
            return self.judge.evaluate(self.artifacts[mixture.members[0]], suites)
        candidate = self.out / CANDIDATE
        shutil.rmtree(candidate, ignore_errors=True)  # left by a process that was killed
        try:
            written = write_mixture(candidate, self.artifacts, mixture, {})
            return self.judge.evaluate(written, suites)
        finally:
            shutil.rmtree(candidate, ignore_errors=True)

    def save(self, rows: list[Row], chosen: Mapping[str, Any] | None = None) -> None:
        """Write the results of all mixtures and the chosen one."""
        self.stored.mixtures = rows
        self.stored.chosen = None if chosen is None else dict(chosen)
        write_text(self.out / FILE, json.dumps(asdict(self.stored), indent=1))

    def of(self, mixture: Mixture) -> Results:
        """Return the results of the suites that were asked for."""
        return {name: self.results[mixture.weights][name] for name in self.judge.suites}

    def _told(self, mixture: Mixture) -> str:
        results = self.of(mixture)
        return ", ".join(
            f"{key} {with_interval(results, key)}" for key in shown_measures(results, self.by)
        )

    def value(self, mixture: Mixture) -> float:
        """Return the mean of the measures that choose, of a mixture that has results."""
        return mean_of(self.of(mixture), self.by)

    def best(self, mixtures: Sequence[Mixture]) -> Mixture:
        """Return the mixture of the highest value, the first of equal ones."""
        return max(mixtures, key=self.value)

    def greedy(self) -> tuple[Mixture, list[Mixture]]:
        """Search the greedy soup (2203.05482, recipe 1): (soup, all mixtures that were evaluated).

        The artifacts are tried in the order of their results, the best first; one that does not
        lower those of the soup joins it. So the soup is never below the best artifact.
        """
        total = len(self.artifacts)
        tried = [soup([position], total) for position in range(total)]
        self.measure(tried, 2 * total - 1)
        order = sorted(range(total), key=lambda p: -self.value(tried[p]))
        members = order[:1]
        for number, position in enumerate(order[1:], start=1):
            larger = soup([*members, position], total)
            self.measure([larger], total - number)
            tried.append(larger)
            if self.value(larger) >= self.value(soup(members, total)):
                members.append(position)
        return soup(members, total), tried
