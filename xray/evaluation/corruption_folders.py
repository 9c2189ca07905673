"""Accuracy on the corrupted pictures of ImageNet-C, as it is published (1903.12261).

Pictures are in FOLDER/CORRUPTION/SEVERITY/CLASS.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.ingest.labelled import open_labelled, place_of
from data_pipelines.shards.source import Source
from xray.errors import DataError
from xray.evaluation.confidence import share
from xray.evaluation.corruption_error import (
    Errors,
    corruption_errors,
    measured_errors,
    read_baseline,
)
from xray.evaluation.corruptions import EXTRA, IMAGENET_C, SEVERITIES
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import labels_of
from xray.evaluation.heads import Head, HeadClasses
from xray.evaluation.suites.robustness import FILES, RobustnessConfig

log = logging.getLogger("xray")

KEY = "eval.robustness.corrupted"
Scores = dict[str, float]
Parts = list[tuple[Tensor, Tensor]]  # numbers of pictures and their hits, for each severity


@dataclass(frozen=True)
class CorruptionFolders:
    """The folders of corrupted pictures that are there, and the errors to compare with."""

    folder: str
    found: Mapping[str, Sequence[int]]  # severities by corruption
    baselines: Mapping[str, Errors]  # by head

    @classmethod
    def open(
        cls, config: RobustnessConfig, sets: Sets, heads: Sequence[HeadClasses]
    ) -> CorruptionFolders:
        """List the folders and read the baseline; raises DataError for other forms of them."""
        folder = place_of(KEY, config.corrupted, sets.data.root)
        baselines: Mapping[str, Errors] = {}
        found = list_corruptions(folder)
        if config.baseline:
            path = place_of("eval.robustness.baseline", config.baseline, sets.data.root)
            baselines = read_baseline(path, [head.name for head in heads])
        return cls(folder, found, baselines)

    def check(self, heads: Sequence[HeadClasses]) -> None:
        """Log what is missing of ImageNet-C; raises DataError if the classes do not fit a head."""
        for line in missing(self.found):
            log.warning("%s=%s: %s", KEY, self.folder, line)
        name, severities = next(iter(self.found.items()))
        source = self.source(name, severities[0])
        labels = labels_of(source)
        for head in heads:
            head.number(labels, source)

    def source(self, corruption: str, severity: int) -> Source:
        """Open the pictures of a corruption and a severity."""
        part = f"{corruption}/{severity}"
        return open_labelled(f"{KEY} {part}", os.path.join(self.folder, part), "image")

    def measure(self, sets: Sets, heads: Sequence[Head], clean: Mapping[str, float]) -> Scores:
        """Measure accuracy of each head on each folder, means and corruption errors.

        clean: HEAD/clean by its name. The features of a folder are not kept.
        """
        scores, numbers = dict[str, float](), dict[str, int]()
        hits: dict[str, dict[str, Parts]] = {h.name: defaultdict(list) for h in heads}
        for corruption, severities in self.found.items():
            for severity in severities:
                source = self.source(corruption, severity)
                spaces = sets.encode(source)
                keys = (source.index(shard).key(member) for shard, member in source.places())
                own = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
                for head in heads:
                    features = spaces[head.space]
                    right = head.right(features, head.number(features.labels, source))
                    scores |= share(f"{head.name}/{FILES}/{corruption}/{severity}", right)
                    hits[head.name][corruption].append((own, right))
        for head in heads:
            scores |= means(f"{head.name}/{FILES}", hits[head.name])
            if head.name in self.baselines:
                errors = measured_errors({**clean, **scores}, head.name)
                ratios = corruption_errors(errors, self.baselines[head.name], head.name)
                scores |= {f"{head.name}/{key}": value for key, value in ratios.items()}
        return scores


def list_corruptions(folder: str) -> dict[str, list[int]]:
    """List the severities of each corruption in a folder, ImageNet-C's own first, in its order.

    Raises DataError if there are none.
    """
    found: dict[str, list[int]] = {}
    for name in sorted(os.listdir(folder) if os.path.isdir(folder) else ()):
        parts = [os.path.join(folder, name, str(severity)) for severity in SEVERITIES]
        if there := [s for s, part in zip(SEVERITIES, parts, strict=True) if os.path.isdir(part)]:
            found[name] = there
    if not found:
        raise DataError(
            f"{KEY}={folder} contains no folder CORRUPTION/SEVERITY/CLASS, such as fog/3/n01440764"
        )
    known = (*IMAGENET_C, *EXTRA)
    order = [*(name for name in known if name in found), *(n for n in found if n not in known)]
    return {name: found[name] for name in order}


def missing(found: Mapping[str, Sequence[int]]) -> list[str]:
    """Count what is missing of ImageNet-C's 15 corruptions and of the 5 severities of each."""
    lines = []
    there = [name for name in IMAGENET_C if name in found]
    if there and len(there) < len(IMAGENET_C):
        absent = ", ".join(name for name in IMAGENET_C if name not in found)
        lines.append(f"{len(there)} of ImageNet-C's 15 corruptions, without {absent}")
    gaps = [f"{n}/{s}" for n, own in found.items() for s in SEVERITIES if s not in own]
    if gaps:
        lines.append(
            f"{len(gaps)} of {len(found) * len(SEVERITIES)} severities are missing, means are over "
            f"the others: {', '.join(gaps)}"
        )
    return lines


def means(name: str, hits: Mapping[str, Parts]) -> Scores:
    """Average over the severities of each corruption, then over corruptions.

    NAME/CORRUPTION and NAME, which is over all but ImageNet-C's extra corruptions; these have
    NAME_extra. The bootstrap draws a picture with all its corrupted versions.
    """
    scores: Scores = {}
    shares = {corruption: _per_picture(parts) for corruption, parts in hits.items()}
    for corruption, (_, own) in shares.items():
        scores |= share(f"{name}/{corruption}", own)
    for ending, extra in (("", False), ("_extra", True)):
        chosen = [own for corruption, own in shares.items() if (corruption in EXTRA) == extra]
        if chosen:
            numbers, own = (torch.cat(column) for column in zip(*chosen, strict=True))
            total, times = _summed(numbers, own)
            scores |= share(f"{name}{ending}", total, times)
    return scores


def _per_picture(parts: Parts) -> tuple[Tensor, Tensor]:
    """Return the pictures' numbers [N] and the share of severities with a hit of each [N]."""
    numbers, hits = (torch.cat(column) for column in zip(*parts, strict=True))
    total, times = _summed(numbers, hits)
    return numbers.unique(), total / times


def _summed(numbers: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the values of each number, and count them, in ascending order of the numbers: [N]."""
    _, places = numbers.unique(return_inverse=True)
    return torch.bincount(places, weights=values.double()), torch.bincount(places)
