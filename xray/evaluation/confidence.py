"""Confidence intervals by the bootstrap: resampling with replacement (Efron, 1979)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

RESAMPLES = 1000
COVERED = 95  # percent, between both ends
HELD = 2**20  # draws in memory at a time


def share(name: str, hits: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """Compute a share as NAME, with its 95 % percentile interval as NAME_low and NAME_high.

    hits: [N], 0 or 1 per sample. With weights [N], hits are sums over as many units of a sample
    (an image's captions, say), which depend on each other and are resampled together.
    """
    own = hits.double().numpy()
    of = np.ones_like(own) if weights is None else weights.double().numpy()
    shares = [(counts @ own) / (counts @ of) for counts in resamples(len(own))]
    value = hits.double().sum().item() / of.sum().item()
    return with_interval(name, value, np.concatenate(shares))


def class_mean(name: str, hits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute the mean over classes of the share in each class as NAME, with its interval.

    hits: [N], 0 or 1 per sample. labels: [N], its class. A class without a sample in a resample is
    left out of that resample's mean.
    """
    order = labels.argsort(stable=True)
    starts = np.unique(labels[order].numpy(), return_index=True)[1]
    own, places = hits[order].double().numpy(), order.numpy()

    def means(counts: np.ndarray) -> np.ndarray:
        drawn = counts[:, places]
        hit = np.add.reduceat(drawn * own, starts, axis=1)
        return _mean_ratio(hit, np.add.reduceat(drawn, starts, axis=1))

    value = float(means(np.ones((1, len(own)), np.int64))[0])
    drawn = [means(counts) for counts in resamples(len(own))]
    return with_interval(name, value, np.concatenate(drawn))


def median(name: str, values: Tensor, owner: Tensor) -> dict[str, float]:
    """Compute a median as NAME, with its interval; values [M] belong to samples `owner` [M]."""
    order = values.argsort()
    ranked, owners = values[order].double().numpy(), owner[order].numpy()
    medians = []
    for counts in resamples(int(owner.max()) + 1):
        until = counts[:, owners].cumsum(axis=1)  # number of draws up to each value
        lower, upper = (until[:, -1:] - 1) // 2, until[:, -1:] // 2
        places = [(until <= middle).sum(axis=1) for middle in (lower, upper)]
        medians.append((ranked[places[0]] + ranked[places[1]]) / 2)
    return with_interval(name, float(np.median(ranked)), np.concatenate(medians))


def mean_ratio(name: str, parts: Tensor, wholes: Tensor) -> dict[str, float]:
    """Compute a mean over classes as NAME, with its interval: of sum(parts) / sum(wholes).

    parts and wholes [N, C] are those of N samples; a class whose wholes are all 0 is left out.
    """
    own, of = parts.double().numpy(), wholes.double().numpy()
    means = [_mean_ratio(counts @ own, counts @ of) for counts in resamples(len(own))]
    value = float(_mean_ratio(own.sum(axis=0)[None], of.sum(axis=0)[None])[0])
    return with_interval(name, value, np.concatenate(means))


def _mean_ratio(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Return the mean over classes of [b, C] ratios, [b]; 0 where all classes are left out."""
    there = wholes > 0
    ratios = parts / np.where(there, wholes, 1)
    means: np.ndarray = ratios.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return means


def resamples(samples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each sample is drawn per resample, in blocks [b, N]; 1000 rows in all."""
    generator = np.random.default_rng(seed)
    block = max(1, min(RESAMPLES, HELD // samples))
    for start in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - start)
        drawn = generator.integers(samples, size=(rows, samples))
        drawn += samples * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * samples).reshape(rows, samples)


def with_interval(name: str, value: float, resampled: np.ndarray) -> dict[str, float]:
    """Return a value as NAME, and the ends of its 95 % interval as NAME_low and NAME_high."""
    tail = (100 - COVERED) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
