"""Few-shot classification: classifiers on frozen features of k labelled samples per class."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from xray.errors import DataError
from xray.evaluation.class_labels import Classes
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Features, labels_of
from xray.evaluation.linear_probe import LinearHead, fit
from xray.evaluation.student_t import mean_interval
from xray.evaluation.suite import LabelledConfig, Measures
from xray.evaluation.suites.few_shot import FewShotConfig
from xray.evaluation.zero_shot import HELD
from xray.progress import progress_of

HISTORY = 10  # steps that L-BFGS remembers: for many small problems, more costs more than it gains
TOLERANCE = 3e-8  # largest derivative at the end; rounding hides smaller ones


def few_shot_of(sets: Sets, config: FewShotConfig) -> Measures:
    """Measure few-shot classification on the data sets of the suite; raises as `check_shots`."""
    check_shots(sets, "few_shot", config, max(config.shots))
    return few_shot(*sets.probe("few_shot", config), config)


def check_shots(sets: Sets, suite: str, config: LabelledConfig, shots: int) -> None:
    """Raise DataError that names a class with fewer training samples than a number of shots."""
    for source, _ in sets.pairs(suite, config):
        labels = labels_of(source)
        classes = Classes.of(labels, source)
        counts = classes.places(labels, source).bincount()
        if counts.min() < shots:
            least = int(counts.argmin())
            name = classes.name(int(classes.numbers[least]))
            raise DataError(
                f"eval.{suite}.shots: {shots} samples per class, but class {name!r} of "
                f"{source.name} has {counts[least]}: use fewer shots"
            )


def few_shot(train: Features, test: Features, config: FewShotConfig) -> dict[str, float]:
    """Measure the mean top-1 accuracy over draws for each number of shots, with chance.

    Labels are numbers from 0 without gaps. Intervals are those of the mean over draws, by Student's
    t-distribution; the test samples are the same in all draws.
    """
    drawn = draw(train.labels, max(config.shots), config.draws, config.seed)
    classes = drawn.shape[1]
    measures = {"chance_top1": 1 / classes, "classes": float(classes)}
    measures |= {"draws": float(config.draws), "samples": float(len(test.labels))}
    for shots in progress_of("few-shot")(iter(config.shots), len(config.shots)):
        found: dict[str, list[float]] = {"logistic": [], "prototype": []}
        for points in _points(train.views, drawn[:, :, :shots]):
            fitted = {"logistic": logistic(points, config.l2), "prototype": prototypes(points)}
            for name, heads in fitted.items():
                right = (head.predict(test.views) == test.labels for head in heads)
                found[name] += [float(own.double().mean()) for own in right]
        for name, shares in found.items():
            key, (low, high) = f"{name}_top1@{shots}", mean_interval(shares)
            ends = {f"{key}_low": max(low, 0.0), f"{key}_high": min(high, 1.0)}
            measures |= {key: statistics.fmean(shares)} | ends
    return measures


def draw(labels: Tensor, shots: int, draws: int, seed: int) -> Tensor:
    """Choose samples of each class at random: their numbers [draws, C, shots], none twice.

    labels: [N], numbers from 0 without gaps. The first k of a draw are its draw of k samples.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = labels.bincount()
    places = (counts.cumsum(0) - counts)[:, None] + torch.arange(shots)
    drawn = []
    for _ in range(draws):
        order = torch.randperm(len(labels), generator=generator)
        by_class = order[labels[order].argsort(stable=True)]
        drawn.append(by_class[places])
    return torch.stack(drawn)


def _points(views: Tensor, drawn: Tensor) -> Iterator[Tensor]:
    """Yield the drawn features [R, C, shots * V, D] double, of as many draws as memory allows."""
    (_, V, D), (_, C, shots) = views.shape, drawn.shape
    held = C * shots * V * (D + C) + 2 * HISTORY * (D + 1) * C
    for some in drawn.split(max(1, HELD // held)):
        yield views[some].flatten(2, 3).double()


def logistic(points: Tensor, l2: float) -> list[LinearHead]:
    """Fit logistic regressions to points [R, C, n, D], one for each of R draws.

    Features are standardised by the mean and deviation of the draw's own samples.
    """
    R, C, n, D = points.shape
    x, labels = points.flatten(1, 2), torch.arange(C).repeat_interleave(n).expand(R, -1)
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-6
    start = x.new_zeros(R, D + 1, C)
    weights = fit((x - mean) / deviation, labels, l2, start, TOLERANCE, HISTORY)
    parts = zip(mean[:, 0], deviation[:, 0], weights, strict=True)
    return [LinearHead(*own, strength=l2) for own in parts]


def prototypes(points: Tensor) -> list[LinearHead]:
    """Make classifiers by the nearest class mean of points [R, C, n, D] (Euclidean distance).

    -|x - p|^2 / 2 is p x - |p|^2 / 2, up to a constant. Source: Snell et al., 1703.05175.
    """
    means = points.mean(2)
    weights = torch.cat([means.mT, -means.square().sum(2)[:, None] / 2], dim=1)
    none = means.new_zeros(points.shape[-1])
    return [LinearHead(none, none + 1, own) for own in weights]
