"""Suites on data with several splits, as HMDB51 and UCF101 have: the mean over the splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipelines.shards.source import ChosenSlots, Source
from xray.evaluation.suite import Measures, Suite

if TYPE_CHECKING:
    from xray.evaluation.config import EvalConfig
    from xray.evaluation.datasets import Sets
    from xray.evaluation.feature_extraction import Features


def by_split(suite: Suite[Any], sets: Sets) -> dict[int, EvalConfig]:
    """Return the settings of each chosen split of a suite's data; {} without split files."""
    whole = sets.config
    config = whole.of(suite)
    if not getattr(config, "splits", "") or not config.has_data():
        return {}
    return {
        number: replace(whole, **{suite.name: replace(config, split=number)})  # type: ignore[type-var]
        for number in sets.splits(suite.name, config)
    }


def run_suite(suite: Suite[Any], sets: Sets) -> Measures:
    """Run a suite; with split files, on each of the chosen splits, and average its measures."""
    whole, splits = sets.config, by_split(suite, sets)
    if not splits:
        return suite.run(sets, whole.of(suite))
    results: dict[int, Measures] = {}
    with sets.scratch():  # what a suite stores there serves all splits
        try:
            for number, config in splits.items():
                sets.config = config
                results[number] = suite.run(sets, config.of(suite))
        finally:
            sets.config = whole
    return mean_over_splits(results)


def mean_over_splits(results: Mapping[int, Measures]) -> Measures:
    """Average measures over splits, also the ends of their intervals; `splits` is their number.

    The measures of each split are there, too, as split_1_NAME. The mean of the ends is at least as
    wide as an interval of the mean.
    """
    first = next(iter(results.values()))
    if len(results) == 1:
        return {**first, "split": float(*results)}
    means = {
        name: sum(measures[name] for measures in results.values()) / len(results) for name in first
    }
    each = {
        f"split_{number}_{name}": value
        for number, measures in results.items()
        for name, value in measures.items()
    }
    return {**means, "splits": float(len(results)), **each}


class Part(NamedTuple):
    """A set, and the numbers [n] of those of its samples that a split has."""

    whole: Source
    numbers: Tensor


class Scratch(NamedTuple):
    """Folder for files of a suite, and what the suite knows of them, by the id of a source."""

    folder: Path
    stored: dict[int, Any]


class Chosen:
    """Rows of an array [N, ...] with these numbers [n], which are read when they are indexed."""

    def __init__(self, rows: np.ndarray, numbers: Tensor) -> None:
        self.rows, self.numbers = rows, numbers.numpy()
        self.shape = (len(numbers), *rows.shape[1:])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        chosen: np.ndarray = self.rows[self.numbers[rows]]
        return chosen


class PartFeatures:
    """Features of a set that is used in parts; a sample is encoded when a part first has it."""

    def __init__(self, whole: Source) -> None:
        self.whole = whole
        self.done = torch.zeros(len(whole), dtype=torch.bool)
        self.spaces: dict[str, Features] = {}

    def of(
        self, numbers: Tensor, space: str, encode: Callable[[Source], Mapping[str, Features]]
    ) -> Features:
        """Return the features of the samples with these numbers [n], in one space."""
        new = numbers[~self.done[numbers]]
        if len(new):
            slots = ChosenSlots(self.whole, new.numpy())
            for name, own in encode(self.whole.with_slots(slots)).items():
                self._add(name, new, own)
            self.done[new] = True
        kept = self.spaces[space]
        return replace(
            kept, rows=kept.rows[numbers], labels=kept.labels[numbers], views=kept.views[numbers]
        )

    def _add(self, space: str, new: Tensor, own: Features) -> None:
        if space not in self.spaces:
            rows, labels, views = (
                part.new_empty(len(self.whole), *part.shape[1:])
                for part in (own.rows, own.labels, own.views)
            )
            self.spaces[space] = replace(own, rows=rows, labels=labels, views=views)
        kept = self.spaces[space]
        kept.rows[new], kept.labels[new], kept.views[new] = own.rows, own.labels, own.views
