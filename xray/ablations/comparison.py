"""What the runs of an ablation came to: numbers by arm, their spread, and how sure a difference is.

The spread is over seeds. An arm is compared with the baseline seed by seed (a paired t-test), as
both see the same samples in the same order with a seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xray.ablations.trials import Ablation, Trial
from xray.artifacts.artifact import find_manifest
from xray.config import nearest
from xray.errors import ConfigError

CHANCE = "chance_"
ROUNDING = 1e-9  # far above that of differences, far below the spread of any two measurements


@dataclass
class Outcome:
    """A finished trial's numbers; samples and seconds by stage, those of shared runs included."""

    arm: str
    seed: int
    values: dict[str, float]  # SUITE.MEASURE and STAGE.METRIC
    samples: dict[str, int]
    seconds: dict[str, float]


@dataclass
class Cell:
    """A metric of an arm over its seeds."""

    values: dict[int, float]  # by seed
    differences: list[float] = field(default_factory=list)  # to the baseline, of seeds both have

    @property
    def mean(self) -> float:
        return mean(list(self.values.values()))

    @property
    def spread(self) -> float:
        """The standard deviation over seeds."""
        return deviation(list(self.values.values()))

    @property
    def difference(self) -> float:
        return mean(self.differences)

    @property
    def p(self) -> float:
        """Of the paired t-test; nan where fewer than two seeds can be compared."""
        return paired_t(self.differences)

    def facts(self) -> dict[str, Any]:
        """It as JSON, null where a number cannot be had."""
        numbers = {
            "mean": self.mean,
            "std": self.spread,
            "difference": self.difference,
            "p": self.p,
        }
        plain = {k: None if math.isnan(v) else v for k, v in numbers.items()}
        return {"n": len(self.values), **plain, "pairs": len(self.differences)}


Comparison = dict[str, dict[str, Cell]]  # by arm, then by metric


def outcome(trial: Trial) -> Outcome:
    """Read a finished trial's results.json and its artifacts' manifests."""
    file = trial.folder / "results.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    manifests = {
        run.stage: find_manifest(Path(run.out) / "artifact")[2] for run in trial.recipe.runs
    }
    found |= {stage: manifest["metrics"] for stage, manifest in manifests.items()}
    return Outcome(
        trial.arm,
        trial.seed,
        {f"{part}.{name}": value for part, own in found.items() for name, value in _numbers(own)},
        {stage: manifest["samples"] for stage, manifest in manifests.items()},
        {stage: manifest["seconds"] for stage, manifest in manifests.items()},
    )


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(k, float(v)) for k, v in values.items() if isinstance(v, int | float)]


def chance_of(metric: str, there: Container[str]) -> str:
    """The name of the measure that says what guessing gives, "" where none does.

    Of X it is chance_X, of a set's NAME/X NAME/chance_X, of retrieval's X/SIZE chance_X; of a
    head's accuracies (which have intervals) HEAD/CHANGE HEAD/chance.
    """
    section, _, name = metric.partition(".")
    part, slash, measure = name.rpartition("/")
    first = name.partition("/")[0]
    names = [f"{part}{slash}{CHANCE}{measure}", f"{CHANCE}{first}"]
    names += [f"{first}/chance"] if f"{metric}_low" in there else []
    return next((own for n in names if (own := f"{section}.{n}") in there), "")


def outcomes_of(ablation: Ablation) -> list[Outcome]:
    """Those of the trials that are finished."""
    return [outcome(trial) for trial in ablation.trials if trial.finished()]


def chosen_metrics(ablation: Ablation, outcomes: Sequence[Outcome]) -> list[str]:
    """Of the metrics asked for those that a run has, or all that have chance beside them."""
    there = _metrics(outcomes)
    asked = [metric for metric in ablation.config.metrics if metric in there]
    listed = [name for name in there if not name.startswith("robustness.")]  # hundreds
    return asked or [name for name in listed if chance_of(name, there)]


def check_metrics(ablation: Ablation, outcomes: Sequence[Outcome]) -> None:
    """Raise ConfigError for a metric that is asked for and that no run has."""
    there = _metrics(outcomes)
    for metric in ablation.config.metrics:
        if metric not in there:
            section = metric.partition(".")[0]
            own = ", ".join(name for name in there if name.startswith(f"{section}."))
            raise ConfigError(
                f"metrics: no run has {metric}{nearest(metric, there)}; {section} has "
                f"{own or 'none'}"
            )


def _metrics(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(name for found in outcomes for name in found.values))


def compare(ablation: Ablation, outcomes: Sequence[Outcome], metrics: Sequence[str]) -> Comparison:
    """Every arm's metrics; where a run failed its seed is left out."""
    values: dict[str, dict[str, dict[int, float]]] = {
        arm: {metric: {} for metric in metrics} for arm in ablation.arms
    }
    for found in outcomes:
        for metric in set(metrics) & found.values.keys():
            values[found.arm][metric][found.seed] = found.values[metric]
    base = values[ablation.config.baseline]
    return {
        arm: {
            metric: Cell(seeds, [seeds[s] - base[metric][s] for s in seeds if s in base[metric]])
            for metric, seeds in own.items()
            if seeds
        }
        for arm, own in values.items()
    }


# statistics ---------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """nan of nothing."""
    return sum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation (n - 1); nan of fewer than two."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p of Student's paired t-test (1908): that the mean difference is 0.

    nan of fewer than two differences, and of equal ones, which have no spread to judge by (but for
    rounding: shares of a count that differ alike do so to the last bits); 1 where all are 0.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    centre, error = mean(differences), deviation(differences) / math.sqrt(n)
    if centre == 0:
        return 1.0
    return student_p(centre / error, n - 1) if error > ROUNDING * abs(centre) else math.nan


def student_p(t: float, df: int) -> float:
    """P(|T| >= |t|) of Student's t with a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2 == 1
    term = cosine if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)
