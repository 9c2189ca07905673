"""Zero-shot classification of samples with several classes: mean average precision.

The labels of a sample are a .npy file of a 0 or 1 for each class, as in the multi-label sets of
CLIP_benchmark, such as VOC 2007.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from data_pipelines.ingest.labelled import class_of
from data_pipelines.shards.source import Source
from xray.errors import DataError
from xray.evaluation.confidence import resamples, with_interval
from xray.evaluation.suites.zero_shot import MAP
from xray.files import NPY_DAMAGE

VECTOR = ("npy",)


def has_label_vectors(source: Source) -> bool:
    """Check if the first sample of a source has a vector of labels and no class."""
    first = next(source.places(), None)
    files = source.read(*first, ("cls", "json", "npy")) if first else {}
    return "npy" in files and not class_of(files)


def label_vectors(source: Source, classes: int) -> Tensor:
    """Read the labels of a source, [N, C] bool; raises DataError naming the sample."""
    rows = np.zeros((len(source), classes), bool)
    for number, place in enumerate(source.places()):
        key = source.index(place[0]).key(place[1])
        try:
            content = io.BytesIO(source.read(*place, VECTOR)["npy"])
            row = np.lib.format.read_array(content)
            row = row.ravel()
        except NPY_DAMAGE as error:  # LookupError: the sample has no .npy
            raise DataError(
                f"{source.name}: sample {key} has no .npy of labels that can be read"
            ) from error
        if row.shape != (classes,) or not np.isin(row, (0, 1)).all():
            raise DataError(
                f"{source.name}: the labels of sample {key} are not {classes} zeros and ones, one "
                f"for each class name, but {row.size} values"
            )
        rows[number] = row
    if not rows.any():
        raise DataError(f"{source.name}: no sample has a class")
    return torch.from_numpy(rows)


def mean_precision(scores: Tensor, truth: Tensor) -> dict[str, float]:
    """Measure the mean over classes of the average precision of scores [N, C], truth [N, C] bool.

    A class's average precision is the mean, over its samples, of the share of correct samples among
    those with at least the same score. Classes without samples are left out and counted. Chance is
    the mean for a random order. The interval resamples the samples.
    """
    present = truth.any(dim=0)
    scores, truth = scores[:, present], truth[:, present]
    own = np.stack([_precision(s, t) for s, t in zip(scores.T, truth.T, strict=True)])
    drawn = ~np.isnan(own)  # some resamples have no sample of a class, or of any
    values = np.nansum(own, axis=0)[drawn.any(axis=0)] / drawn.sum(axis=0)[drawn.any(axis=0)]
    chance = [_chance(int(n), len(truth)) for n in truth.sum(dim=0)]
    return {
        **with_interval(MAP, float(values[0]), values[1:]),
        f"chance_{MAP}": float(np.mean(chance)),
        "samples": float(len(truth)),
        "classes": float(len(present)),
        "absent_classes": float((~present).sum()),
    }


def _precision(scores: Tensor, truth: Tensor) -> np.ndarray:
    """Compute the average precision of a class, first of the samples and then of each resample.

    A resample without the class has NaN.
    """
    order = scores.argsort(descending=True)
    ranked, correct = scores[order].double().numpy(), truth[order].double().numpy()
    # the last place with the same score as each place
    last = len(ranked) - 1 - np.searchsorted(ranked[::-1], ranked)
    found = [_weighted(np.ones((1, len(ranked))), correct, last)]
    places = order.numpy()
    found += [_weighted(counts[:, places], correct, last) for counts in resamples(len(ranked))]
    return np.concatenate(found)


def _weighted(counts: np.ndarray, correct: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Compute average precisions [b] of ranked samples that are there `counts` [b, N] times."""
    hits = counts * correct
    within, total = hits.cumsum(axis=1)[:, last], counts.cumsum(axis=1)[:, last]
    precision = np.divide(within, total, out=np.zeros_like(within), where=total > 0)
    positives = hits.sum(axis=1)
    sums = (hits * precision).sum(axis=1)
    return np.divide(sums, positives, out=np.full_like(sums, np.nan), where=positives > 0)


def _chance(positives: int, samples: int) -> float:
    """Compute the mean average precision of R positives in a random order of N samples.

    At a positive's place i, the others before it are (i - 1) (R - 1) / (N - 1) on average.
    """
    if samples == 1:
        return 1.0
    places = np.arange(1, samples + 1)
    return float(np.mean((1 + (places - 1) * (positives - 1) / (samples - 1)) / places))
