"""Keyed permutation of [0, n) in constant memory: a Feistel network with cycle walking.

It replaces a random permutation, which would need an array as long as the data. Each element may
have a different n and a different key, so one call permutes a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SALTS = np.arange(8, dtype=np.uint64) * GOLDEN  # one per round


def mixed(x: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values [...] with the finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys_of(entropy: Sequence[int], numbers: np.ndarray) -> np.ndarray:
    """Derive a uint64 key for each number from the entropy, [n]."""
    base = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return mixed(base + steps(np.asarray(numbers)))


def steps(numbers: np.ndarray) -> np.ndarray:
    """Return the increments of splitmix64's state for draws number 0, 1, ...: [...] uint64."""
    return (numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN


def permuted(x: np.ndarray, n: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Permute x within [0, n) by the permutation that the key selects: all [B], x < n."""
    x, n = x.astype(np.uint64), np.asarray(n)
    # The network permutes numbers of 2 * half bits, the smallest such range that contains [0, n).
    # A result outside [0, n) is permuted again until it is inside (cycle walking).
    half = np.maximum(1, np.ceil(np.log2(np.maximum(n, 2)) / 2)).astype(np.uint64)
    limit = n.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        x[outside] = _feistel(x[outside], half[outside], keys[outside])
        outside = x >= limit
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for salt in SALTS:
        left, right = right, left ^ (mixed(right ^ (keys + salt)) & mask)
    return (left << half) | right
