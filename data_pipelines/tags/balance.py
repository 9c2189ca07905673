"""Balanced tags: samples with rare tags are repeated within an epoch (1805.00932, 2201.08371).

A tag h that occurs in f(h) samples gets the factor r(h) = max(1, phi(T / f(h))) with phi the square
root ("sqrt") or the identity ("uniform"). A sample is repeated max r(h) times over its tags, and
its copy j keeps the tags with r(h) > j, so that a frequent tag that rides on a rare one is not
counted with each copy. Fractions are settled by one number u in [0, 1) per sample, drawn from
(seed, key): floor(r + u) for every tag of the sample, whose maximum is floor(max r + u).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Balance = Literal["sqrt", "uniform", "none"]
MOST_COPIES = 1000  # of one sample, however rare its tags


@dataclass(frozen=True)
class Replication:
    """Factors of all tags, [V] float64, at least 1."""

    factors: np.ndarray

    def copies(self, ids: np.ndarray, ends: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Repeats of each sample, [n]: ids of all tags, the samples' ends in them; 0 = no tags."""
        starts = np.concatenate([[0], ends[:-1]])
        result = np.zeros(len(ends), np.int64)
        tagged = np.flatnonzero(ends > starts)
        if len(tagged):
            largest = np.maximum.reduceat(self.factors[ids], starts[tagged])
            result[tagged] = np.floor(largest + u[tagged]).astype(np.int64)
        return result

    def kept(self, ids: np.ndarray, u: float, copy: int) -> np.ndarray:
        """Which tags of a sample are labels of its copy (from 0), [k] bool."""
        return np.floor(self.factors[ids] + u) > copy


def replication(
    counts: np.ndarray, rarest: np.ndarray, balance: Balance, length: float
) -> tuple[Replication, float]:
    """(factors, T) for which an epoch has `length` times as many slots as samples.

    counts: samples per tag, [V]. rarest: samples by their rarest tag, [V].
    """
    counts, rarest = counts.astype(np.float64), rarest.astype(np.float64)
    known = counts > 0
    most = float(counts.max(initial=0.0))
    if balance == "none" or length <= 1 or not rarest.sum():
        return Replication(np.ones(len(counts))), 0.0

    def factors(threshold: float) -> np.ndarray:
        ratio = np.divide(threshold, counts, out=np.ones_like(counts), where=known)
        grown = np.sqrt(ratio) if balance == "sqrt" else ratio
        return np.clip(grown, 1.0, MOST_COPIES)

    wanted = length * rarest.sum()
    low, high = 1e-9, most
    while (rarest * factors(high)).sum() < wanted and high < most * MOST_COPIES**2:
        high *= 2
    for _ in range(100):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if (rarest * factors(middle)).sum() < wanted else (low, middle)
    return Replication(factors(high)), float(high)


def rarest_of(ids: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The rarest tag of each sample that has one, [m]: by count, of equals the later."""
    starts = np.concatenate([[0], ends[:-1]])
    starts = starts[ends > starts]
    if not len(starts):
        return np.empty(0, np.int64)
    order = np.lexsort((np.arange(len(counts)), -counts))  # most frequent first
    place = np.empty(len(counts), np.int64)
    place[order] = np.arange(len(counts))
    return order[np.maximum.reduceat(place[ids], starts)]


def uniform(seed: int, identity: str) -> float:
    """A sample's number in [0, 1), the same wherever and whenever it is asked for."""
    text = f"{seed}\0{identity}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def slots_of(copies: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(members, copies) of the slots of a shard whose members are repeated so often."""
    repeats = np.asarray(copies, np.int64)
    members = np.repeat(np.arange(len(repeats)), repeats)
    first = np.cumsum(repeats) - repeats
    return members.astype(np.int32), (np.arange(len(members)) - first[members]).astype(np.int32)
