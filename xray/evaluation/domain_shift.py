"""Accuracy on other sources of a head's classes, and its gap to the head's own samples."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from data_pipelines.shards.source import Source
from xray.errors import DataError
from xray.evaluation.confidence import share
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import labels_of
from xray.evaluation.heads import Head, HeadClasses
from xray.evaluation.suites.robustness import RobustnessConfig

Scores = dict[str, float]


def check_shift(head: HeadClasses, config: RobustnessConfig, sets: Sets) -> None:
    """Raise DataError for a set whose classes do not fit the head."""
    for name in config.shifts():
        source = _open(name, head, config, sets)
        _numbered(name, labels_of(source), source, head)


def shifted(head: Head, config: RobustnessConfig, sets: Sets) -> Scores:
    """Measure accuracy on each set, and the accuracy on the head's own samples minus that (gap).

    The measures of a single set are HEAD/shift, shift_gap and shift_samples, those of a set with a
    name HEAD/shift/NAME and so on, beside the means over these sets, HEAD/shift and shift_gap.
    """
    scores: Scores = {}
    for name in config.shifts():
        scores |= _measured(name, head, config, sets)
    if isinstance(config.shift, dict):
        parts = {"shift": "shift/", "chance_shift": "shift/chance_", "shift_gap": "shift_gap/"}
        for measure, of_set in parts.items():
            keys = [f"{head.name}/{of_set}{name}" for name in config.shift]
            if values := [scores[key] for key in keys if key in scores]:
                scores[f"{head.name}/{measure}"] = fmean(values)
    return scores


def _measured(name: str, head: Head, config: RobustnessConfig, sets: Sets) -> Scores:
    """Measure a set; predictions for one with a name are chosen from the classes that it has.

    Its gap is to the head's own samples of these classes, with predictions chosen from them, too.
    """
    source, ending = _open(name, head, config, sets), f"/{name}" if name else ""
    start = f"{head.name}/shift"
    features = sets.features(source, head.space)
    labels = _numbered(name, features.labels, source, head)
    kept = labels >= 0
    among = labels[kept].unique() if name else torch.arange(head.classes)
    scores = share(f"{start}{ending}", head.right(features, labels, among)[kept])
    scores[f"{start}_samples{ending}"] = float(kept.sum())
    if name:
        scores[f"{start}/chance_{name}"] = 1 / len(among)
        scores[f"{start}_classes{ending}"] = float(len(among))
        scores[f"{start}_left_out{ending}"] = float((~kept).sum())
    own = torch.isin(head.labels, among)
    if own.any():
        hits = head.right(sets.features(head.source, head.space), head.labels, among)[own]
        clean = share(f"{start}_clean{ending}", hits)
        scores |= clean if name else {}
        gap = clean[f"{start}_clean{ending}"] - scores[f"{start}{ending}"]
        scores[f"{start}_gap{ending}"] = gap
    return scores


def _open(name: str, head: HeadClasses, config: RobustnessConfig, sets: Sets) -> Source:
    key = f"robustness.shift.{name}" if name else "robustness.shift"
    return sets.open(key, config.shifts()[name], head.source.modality)


def _numbered(name: str, labels: Tensor, source: Source, head: HeadClasses) -> Tensor:
    """Number labels by the head's classes; -1 for other classes of a set with a name."""
    if not name:
        return head.places(labels, source)
    places = head.number(labels, source, some=True)
    if len(places[places >= 0].unique()) < 2:
        raise DataError(f"{source.name} has samples of one class of {head.source.name}: give two")
    return places
