"""Results of an ablation's runs: mean and deviation by arm, and significance of differences.

The standard deviation is over seeds. Each arm is compared with the baseline by a t-test paired by
seed, because runs with the same seed see the same samples in the same order.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xray.ablations.trials import RESULTS, Ablation, Trial
from xray.artifacts.artifact import find_manifest
from xray.config import nearest
from xray.errors import ConfigError
from xray.evaluation.student_t import student_p
from xray.records import read_record

CHANCE = "chance_"
# Relative limit between rounding errors of equal differences and the spread of measurements.
ROUNDING = 1e-9


@dataclass
class Outcome:
    """Results of a finished trial, including those of the stage runs it shares."""

    arm: str
    seed: int
    values: dict[str, float]  # by name, SUITE.MEASURE or STAGE.METRIC
    samples: dict[str, int]  # training samples by stage
    seconds: dict[str, float]  # training time by stage


@dataclass
class Cell:
    """Table cell: one metric of one arm over its seeds."""

    values: dict[int, float]  # by seed
    differences: list[float] = field(default_factory=list)  # to the baseline, with equal seeds

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean([*self.values.values()])

    @property
    def std(self) -> float:
        """Standard deviation over seeds; nan for fewer than two."""
        return deviation([*self.values.values()])

    @property
    def difference(self) -> float:
        """Mean difference to the baseline."""
        return mean(self.differences)

    @property
    def p(self) -> float:
        """p-value of the paired t-test; nan for fewer than two pairs."""
        return paired_t(self.differences)

    def facts(self) -> dict[str, Any]:
        """Return the cell as JSON, with null for numbers that are not defined."""
        numbers = {name: getattr(self, name) for name in ("mean", "std", "difference", "p")}
        plain = {k: None if math.isnan(v) else v for k, v in numbers.items()}
        return {"n": len(self.values), **plain, "pairs": len(self.differences)}


Comparison = dict[str, dict[str, Cell]]  # by arm, then by metric


def read_outcome(trial: Trial) -> Outcome:
    """Read a finished trial's results.json and its artifacts' manifests."""
    file = trial.folder / RESULTS
    sections: dict[str, dict[str, Any]] = {}
    if file.is_file():
        sections = read_record(file, dict[str, dict[str, Any]], advice="; delete it")
    manifests = {
        run.stage: find_manifest(Path(run.out) / "artifact")[2] for run in trial.recipe.runs
    }
    sections |= {stage: manifest["metrics"] for stage, manifest in manifests.items()}
    values = {
        f"{section}.{name}": float(value)
        for section, results in sections.items()
        for name, value in results.items()
        if isinstance(value, int | float)
    }
    samples = {stage: manifest["samples"] for stage, manifest in manifests.items()}
    seconds = {stage: manifest["seconds"] for stage, manifest in manifests.items()}
    return Outcome(trial.arm, trial.seed, values, samples, seconds)


def chance_name(metric: str) -> str:
    """Return the name of the chance level of X or NAME/X: chance_X or NAME/chance_X."""
    section, _, name = metric.partition(".")
    part, slash, measure = name.rpartition("/")
    return f"{section}.{part}{slash}{CHANCE}{measure}"


def chance_of(metric: str, available: Container[str]) -> str:
    """Return the name of a metric's chance level among the available metrics, or "".

    The names are: that of chance_name, chance_X for retrieval's X/SIZE and the few-shot
    METHOD_X@SHOTS, and HEAD/chance for HEAD/CHANGE, the accuracies with intervals of the robustness
    suite.
    """
    section, _, name = metric.partition(".")
    first, measure = name.partition("/")[0], name.rpartition("/")[2]
    names = [chance_name(metric), f"{section}.{CHANCE}{first}"]
    few = re.fullmatch(r"[a-z]+_(\w+)@\d+", measure)
    names += [f"{section}.{CHANCE}{few[1]}"] if few else []
    names += [f"{section}.{first}/chance"] if f"{metric}_low" in available else []
    return next((full for full in names if full in available), "")


def outcomes_of(ablation: Ablation) -> list[Outcome]:
    """Read the outcomes of all finished trials."""
    return [read_outcome(trial) for trial in ablation.trials if trial.finished()]


def chosen_metrics(ablation: Ablation, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the metrics to compare: those in the ablation's `metrics` that a run has.

    If there are none: all with a chance level, except those of the robustness suite.
    """
    available = _metrics(outcomes)
    chosen = [metric for metric in ablation.config.metrics if metric in available]
    # the robustness suite has hundreds of metrics
    by_default = [name for name in available if not name.startswith("robustness.")]
    return chosen or [name for name in by_default if chance_of(name, available)]


def check_metrics(ablation: Ablation, outcomes: Sequence[Outcome]) -> None:
    """Raise ConfigError if no run has one of the ablation's `metrics`."""
    available = _metrics(outcomes)
    for metric in ablation.config.metrics:
        if metric not in available:
            section = metric.partition(".")[0]
            choices = ", ".join(name for name in available if name.startswith(f"{section}."))
            raise ConfigError(
                f"metrics: no run has {metric}{nearest(metric, available)}; {section} has "
                f"{choices or 'none'}"
            )


def _metrics(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(name for outcome in outcomes for name in outcome.values))


def compare(ablation: Ablation, outcomes: Sequence[Outcome], metrics: Sequence[str]) -> Comparison:
    """Collect each arm's metrics over seeds; a run that failed is left out."""
    values: dict[str, dict[str, dict[int, float]]] = {
        arm: {metric: {} for metric in metrics} for arm in ablation.arms
    }
    for outcome in outcomes:
        for metric in set(metrics) & outcome.values.keys():
            values[outcome.arm][metric][outcome.seed] = outcome.values[metric]
    base = values[ablation.config.baseline]
    return {
        arm: {
            metric: Cell(seeds, [seeds[s] - base[metric][s] for s in seeds if s in base[metric]])
            for metric, seeds in by_metric.items()
            if seeds
        }
        for arm, by_metric in values.items()
    }


# statistics ---------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """Return the mean, or nan for no values."""
    return statistics.fmean(values) if values else math.nan


def common(values: Sequence[float]) -> float:
    """Return the mean of values that agree to 1 %, or nan for other values and for none."""
    agree = bool(values) and max(values) - min(values) <= 0.01 * max(values)
    return mean(values) if agree else math.nan


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation (n - 1), or nan for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def paired_t(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of Student's paired t-test (1908).

    It is nan for fewer than two differences and for equal ones, up to rounding, which have no
    variance; it is 1 if all are 0.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    centre, error = mean(differences), deviation(differences) / math.sqrt(n)
    if centre == 0:
        return 1.0
    return student_p(centre / error, n - 1) if error > ROUNDING * abs(centre) else math.nan
