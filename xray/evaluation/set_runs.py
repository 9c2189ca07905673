"""Evaluation of named data sets, one after the other; finished ones are not repeated."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xray.config.identity import hash_json
from xray.errors import ArtifactError, ConfigError
from xray.evaluation.checks import check_data, check_suites
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.named_sets import NamedSet, named_sets, naming
from xray.evaluation.overlap import Training, find_overlap, trained_on
from xray.evaluation.set_features import Data, SharedSets, Uses, data_of, picture_keys
from xray.evaluation.splits import run_suite
from xray.evaluation.suite import Suite
from xray.evaluation.suites import suite_named
from xray.records import parse_record
from xray.version import __version__
from xray.words import count

log = logging.getLogger("xray")
SETS = "sets"  # key of the results of named sets in a file


@dataclass(frozen=True)
class SetResult:
    """Measures of a suite on a named set, and shares of the set that were trained on.

    settings: hash of all that the measures depend on.
    """

    settings: str
    measures: dict[str, float]
    overlap: dict[str, float] = field(default_factory=dict)  # by key of the set


SetResults = dict[str, dict[str, SetResult]]  # by set and suite


def as_json(results: SetResults) -> dict[str, Any]:
    """Return results as JSON values."""
    return {
        name: {suite: asdict(result) for suite, result in own.items()}
        for name, own in results.items()
    }


def merged(results: SetResults, more: SetResults) -> SetResults:
    """Join results by set and suite; `more` replaces those of the same set and suite."""
    names = dict.fromkeys([*results, *more])
    return {name: results.get(name, {}) | more.get(name, {}) for name in names}


@dataclass(frozen=True)
class EarlierFile:
    """The file of results that an earlier run may have written."""

    path: Path | None

    @functools.cached_property
    def content(self) -> Any:
        """Content of the file, {} if it is not there; raises ValueError."""
        there = self.path is not None and self.path.is_file()
        return json.loads(self.path.read_bytes()) if self.path and there else {}

    def sets(self, *keys: str) -> SetResults:
        """Return its results of named sets, below these keys; {} if it has none.

        Raises ArtifactError for a file that is damaged.
        """
        try:
            content = self.content
            for key in (*keys, SETS):
                content = content.get(key, {})
            return parse_record(json.dumps(content), SetResults)
        except (ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{self.path}, which should hold the results of finished sets, cannot be read: "
                f"{error}; delete it, or write elsewhere"
            ) from error


@dataclass
class Checked:
    """Hash of the settings and data of each suite of a set, and the keys of its pictures."""

    settings: dict[str, str] = field(default_factory=dict)
    pictures: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass
class SetRun:
    """Evaluation of an artifact on the named sets; asked: names of suites, () = all."""

    evaluator: Evaluator
    asked: Sequence[str] = ()
    only: frozenset[str] | None = None  # suites that this artifact of a recipe runs, None = all
    others: Sequence[frozenset[str]] = ()  # what the models that it is compared with offer
    unknown: str = field(default="", init=False)  # line about training data that is not known

    def evaluate(self, known: SetResults, save: Callable[[SetResults], None]) -> SetResults:
        """Check all sets, then run those that are not in `known` with the same settings and data.

        Each picture is decoded once. save: called with all results so far, after each new one.
        Raises ConfigError, ArtifactError or DataError naming the set, before the first one runs.
        """
        config, root = self.evaluator.config, self.evaluator.sets.data.root
        named = self._able(named_sets(config, root, self.asked))
        checked = {own.name: self._checked(own) for own in named}
        results: SetResults = {own.name: {} for own in named}
        todo = []
        for own in named:
            there = known.get(own.name, {})
            for suite, settings in checked[own.name].settings.items():
                if suite in there and there[suite].settings == settings:
                    results[own.name][suite] = there[suite]
            if left := tuple(s for s in own.suites if s not in results[own.name]):
                todo.append(NamedSet(own.name, left, own.config))
        if finished := sum(map(len, results.values())):
            log.info("%s of an earlier run of the same command", count(finished, "result"))
        shared, uses = self._sets(), Uses([checked[own.name].pictures for own in todo])
        trained = trained_on(shared.encoder.artifact)
        for place, number in enumerate(uses.order):
            own = todo[number]
            log.info("set %d of %d: %s, %s", place + 1, len(todo), own.name, ", ".join(own.suites))
            for name in own.suites:
                with naming(own.name):
                    result = self._run(own, suite_named(name), shared, trained)
                results[own.name][name] = SetResult(checked[own.name].settings[name], *result)
                save(results)
            shared = shared.following(uses, place)
        return {own.name: {n: results[own.name][n] for n in own.suites} for own in named}

    def _able(self, named: Sequence[NamedSet]) -> list[NamedSet]:
        """Return the sets with the suites that the artifact can run; tells of the others."""
        offers, found, left = self.evaluator.offers, list[NamedSet](), list[str]()
        for own in named:
            mine = [n for n in own.suites if self.only is None or n in self.only]
            able = tuple(name for name in mine if suite_named(name).needs <= offers)
            left += [f"{own.name} {name}" for name in mine if name not in able]
            found += [NamedSet(own.name, able, own.config)] if able else []
        what = f"{self.evaluator.sets.what}, which offers {', '.join(sorted(offers))}"
        needs = [suite_named(name).needs for own in named for name in own.suites]
        if self.only is None and not any(n <= o for n in needs for o in (offers, *self.others)):
            asked = f" for --suite {','.join(self.asked)}" if self.asked else ""
            nor = ", nor on another of the models" if self.others else ""
            raise ConfigError(f"eval.sets has nothing{asked} that can be run on {what}{nor}")
        if left:
            log.warning("%d of eval.sets cannot be run on %s: %s", len(left), what, ", ".join(left))
        return found

    def _sets(self) -> SharedSets:
        sets = self.evaluator.sets
        shared = SharedSets(sets.encoder, sets.config, sets.data.root, sets.data.workers)
        shared.dealt = sets.dealt
        return shared

    def _checked(self, own: NamedSet) -> Checked:
        """Check a set; raises the errors of `evaluate`."""
        sets, found = self._sets().of(own), Checked()
        parts: dict[tuple[str, int], Data] = {}
        facts = {"artifact": sets.encoder.artifact.digest, "xray": __version__}
        with naming(own.name):
            check_suites(own.suites, sets.config, self.evaluator.offers, sets.what, sets.data.root)
            for suite in map(suite_named, own.suites):
                check_data(suite, sets)
                state = {}
                for part in data_of(sets, (suite, *suite.reads)):
                    once = parts.setdefault((part.place, id(part.source)), part)
                    state[part.place] = once.fingerprint
                facts_of = [suite.name, facts, state, own.settings(suite)]
                found.settings[suite.name] = hash_json(facts_of)
        keys = [picture_keys(part.source) for part in parts.values() if part.source is not None]
        found.pictures = np.unique(np.concatenate([found.pictures, *keys]))
        return found

    def _run(
        self, own: NamedSet, suite: Suite[Any], shared: SharedSets, trained: Training
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Run a suite on a set; returns its measures and overlaps."""
        sets = shared.of(own)
        measures = dict(run_suite(suite, sets))
        overlap = find_overlap(sets, [suite], trained)
        self.unknown = overlap.unknown
        return measures, {key.partition(".")[2]: share for key, share in overlap.shares.items()}
