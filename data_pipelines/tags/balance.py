"""Tag-balanced sampling: repeats samples with rare tags within an epoch (1805.00932, 2201.08371).

A tag h that occurs in f(h) samples has the factor r(h) = max(1, phi(T / f(h))). phi is the square
root ("sqrt") or the identity ("uniform"). A sample is repeated max r(h) times, with the maximum
over its tags. Copy j (from 0) keeps only the tags with r(h) > j. So a frequent tag of a sample that
also has a rare tag is not counted with every copy.

Fractional factors are rounded at random: each sample has one number u in [0, 1), drawn from (seed,
key), and r is replaced by floor(r + u) for all its tags. The maximum is then floor(max r + u).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Balance = Literal["sqrt", "uniform", "none"]
MOST_COPIES = 1000  # upper limit of the factor of a tag


@dataclass(frozen=True)
class Replication:
    """Repeat factors of all tags, [V] float64, at least 1."""

    factors: np.ndarray

    def copies(self, ids: np.ndarray, ends: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return the number of copies of each sample, [n]; 0 for a sample without tags.

        ids: tags of all samples. ends: end of each sample in `ids`, [n]. u: random numbers, [n].
        """
        starts = np.concatenate([[0], ends[:-1]])
        result = np.zeros(len(ends), np.int64)
        tagged = np.flatnonzero(ends > starts)
        if len(tagged):
            largest = np.maximum.reduceat(self.factors[ids], starts[tagged])
            result[tagged] = np.floor(largest + u[tagged]).astype(np.int64)
        return result

    def kept(self, ids: np.ndarray, u: float, copy: int) -> np.ndarray:
        """Mark the tags of a sample that its copy number `copy` (from 0) keeps as labels, [k]."""
        return np.floor(self.factors[ids] + u) > copy


def replication(
    counts: np.ndarray, rarest: np.ndarray, balance: Balance, length: float
) -> tuple[Replication, float]:
    """Find (factors, T) so that an epoch has `length` times as many slots as labelled samples.

    counts: samples with each tag, [V]. rarest: samples whose rarest tag is this one, [V].
    """
    counts, rarest = counts.astype(np.float64), rarest.astype(np.float64)
    used = counts > 0
    most = float(counts.max(initial=0.0))
    if balance == "none" or length <= 1 or not rarest.sum():
        return Replication(np.ones(len(counts))), 0.0

    def factors(threshold: float) -> np.ndarray:
        ratio = np.divide(threshold, counts, out=np.ones_like(counts), where=used)
        raw = np.sqrt(ratio) if balance == "sqrt" else ratio
        return np.clip(raw, 1.0, MOST_COPIES)

    wanted = length * rarest.sum()
    low, high = 1e-9, most
    while (rarest * factors(high)).sum() < wanted and high < most * MOST_COPIES**2:
        high *= 2
    for _ in range(100):  # bisection on a logarithmic scale
        middle = np.sqrt(low * high)
        low, high = (middle, high) if (rarest * factors(middle)).sum() < wanted else (low, middle)
    return Replication(factors(high)), float(high)


def rarest_of(ids: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the rarest tag of each sample that has tags, [m]; of equal counts, the larger id."""
    starts = np.concatenate([[0], ends[:-1]])
    starts = starts[ends > starts]
    if not len(starts):
        return np.empty(0, np.int64)
    order = np.lexsort((np.arange(len(counts)), -counts))  # most frequent first
    rank = np.empty(len(counts), np.int64)
    rank[order] = np.arange(len(counts))
    return order[np.maximum.reduceat(rank[ids], starts)]


def uniform(seed: int, identity: str) -> float:
    """Return a number in [0, 1) that depends only on the seed and the identity of a sample."""
    text = f"{seed}\0{identity}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def slots_of(copies: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (members, copies) of the slots of a shard, from the number of copies per member."""
    repeats = np.asarray(copies, np.int64)
    members = np.repeat(np.arange(len(repeats)), repeats)
    first = np.cumsum(repeats) - repeats
    return members.astype(np.int32), (np.arange(len(members)) - first[members]).astype(np.int32)
