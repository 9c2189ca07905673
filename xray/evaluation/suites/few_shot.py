"""Few-shot classification: classifiers on frozen features of k labelled samples per class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xray.artifacts.offers import VISION
from xray.errors import ConfigError
from xray.evaluation.suite import (
    LabelledConfig,
    Measures,
    Row,
    Suite,
    share_row,
    with_bars,
)
from xray.evaluation.suites.knn import KNN
from xray.words import count

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets

CLASSIFIERS = {"logistic": "logistic regression", "prototype": "nearest class mean"}


@dataclass
class FewShotConfig(LabelledConfig):
    """Numbers of samples per class, and of random draws of them."""

    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])  # samples per class
    draws: int = 10  # of the samples; results are means over the draws
    l2: float = 0.1  # L2 strength of the logistic regression, at all numbers of shots
    seed: int = 0  # of the draws

    def validate(self, key: str) -> None:
        super().validate(key)
        if not self.shots or min(self.shots) < 1:
            raise ConfigError(f"{key}.shots={self.shots}: give numbers of samples per class")
        if self.draws < 2 or self.l2 <= 0:
            raise ConfigError(f"{key}: draws must be at least 2, and l2 above 0")


def _run(sets: Sets, config: FewShotConfig) -> Measures:
    from xray.evaluation.few_shot import few_shot_of

    return few_shot_of(sets, config)


def _check(sets: Sets, config: FewShotConfig) -> None:
    from xray.evaluation.few_shot import check_shots

    check_shots(sets, "few_shot", config, max(config.shots))


def _title(measure: str) -> str:
    """Name a measure, such as: 4-shot logistic regression."""
    name, _, shots = measure.partition("_top1@")
    return f"{shots}-shot {CLASSIFIERS.get(name, name)}" if shots else f"few-shot {measure}"


def _shots(measures: Measures, name: str) -> Iterator[tuple[int, str]]:
    """Yield (samples per class, key) of a classifier's results."""
    for key in measures:
        before, found, shots = key.partition(f"{name}_top1@")
        if found and not before and shots.isdecimal():
            yield int(shots), key


def _rows(measures: Measures) -> Iterator[Row]:
    over = f"{count(measures['draws'], 'draw')}, {count(measures['samples'], 'sample')}"
    for name in CLASSIFIERS:
        for _, key in _shots(measures, name):
            yield share_row(_title(key), measures, key, measures["chance_top1"], over)


def _plot(measures: Measures, path: Path) -> None:
    """Plot the accuracy of each classifier, with its interval, over the samples per class."""
    from xray.reports.figures import label_axis, subplots

    figure, (axis,) = subplots(1, (4.8, 3.6))
    for (name, label), marker in zip(CLASSIFIERS.items(), "os", strict=True):
        shots, keys = zip(*sorted(_shots(measures, name)), strict=True)
        values, bars = with_bars([(measures, key) for key in keys])
        axis.errorbar(shots, values, bars, marker=marker, ms=4, lw=1.2, capsize=2, label=label)
    axis.axhline(100 * measures["chance_top1"], color="gray", lw=0.8, ls=":", label="chance")
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, [str(k) for k in shots])
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)
    label_axis(axis, "labelled samples per class", "top-1 %")
    figure.savefig(path)


FEW_SHOT = Suite(
    "few_shot",
    FewShotConfig,
    needs=frozenset({VISION}),
    run=_run,
    rows=_rows,
    title=_title,
    sets_from=KNN,
    plot=_plot,
    check=_check,
    added=True,
)
