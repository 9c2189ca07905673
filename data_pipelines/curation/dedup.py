"""Deduplication: by the bytes of the media, by a perceptual hash, or by embeddings.

The pool is compared by 64-bit hashes, which need 8 bytes per sample and kind, and about 50 bytes
while they are sorted. With 10^8 samples, the probability that any two different ones share 64 bits
of their sha256 is 3e-4. A dHash is less specific: images with little content share few values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipelines.curation.filters import read_media
from data_pipelines.decode.near_duplicates import dhash_of, first_64
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import metadata_of
from xray.errors import BadSample

EXACT_BELOW = 20_000  # number of embeddings up to which all pairs are compared
BLOCK = 1024  # rows of embeddings to compare at once
ROUNDS = 10  # of k-means


# hashes of one sample -------------------------------------------------------------------------


@dataclass(frozen=True)
class MediaHasher:
    """Function that hashes the media of a shard; pickled to the worker processes.

    Columns of the table: members [n] int32; exact [n] int64, 64 bits of the sha256; perceptual [n]
    int64, the dHash, 0 = not computed or an image without gradients; broken [n] uint8, 1 = the
    media cannot be read and have no hashes.
    """

    source: Source
    sha256: str = "media"
    perceptual: bool = True

    def __call__(self, shard: int) -> Columns:
        members = np.unique(self.source.members(shard)).astype(np.int32)
        rows = [self._hashes(shard, member) for member in members.tolist()]
        exact, perceptual, broken = np.array(rows, np.int64).reshape(-1, 3).T
        columns = {"members": members, "exact": exact, "perceptual": perceptual}
        return {**columns, "broken": broken.astype(np.uint8)}

    def _hashes(self, shard: int, member: int) -> tuple[int, int, int]:
        """Return (exact, perceptual, broken) of a member."""
        try:
            exact = self._recorded(shard, member) if self.sha256 == "json" else None
            if exact is not None and not self.perceptual:
                return exact, 0, 0
            media = read_media(self.source, shard, member)
            if exact is None:
                exact = first_64(hashlib.sha256(media).digest())
            is_clip = self.source.modality != "image"
            return exact, dhash_of(media, is_clip) if self.perceptual else 0, 0
        except BadSample:
            return 0, 0, 1

    def _recorded(self, shard: int, member: int) -> int | None:
        """Return 64 bits of the sha256 in the JSON of a sample; None if it has no valid one."""
        recorded = metadata_of(self.source.read(shard, member, ("json",))).get("sha256")
        if not isinstance(recorded, str) or not recorded:
            return None
        try:
            return first_64(bytes.fromhex(recorded))
        except ValueError:  # not hexadecimal
            return None


def mark_duplicates(groups: np.ndarray, key_of: Callable[[int], str]) -> np.ndarray:
    """Mark all elements of each group but the one with the smallest key: [N] bool.

    Of equal keys, the first element stays. key_of is called only for groups of two or more.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(sizes[group] > 1)
    best: dict[int, tuple[str, int]] = {}
    for position, number in zip(shared.tolist(), group[shared].tolist(), strict=True):
        candidate = key_of(position), position
        best[number] = min(best.get(number, candidate), candidate)
    duplicate = np.zeros(len(groups), bool)
    duplicate[shared] = True
    duplicate[[position for _, position in best.values()]] = False
    return duplicate


# embeddings -----------------------------------------------------------------------------------

Rows = Callable[[np.ndarray], np.ndarray]  # positions [k] -> their embeddings [k, D] float32


def similar_pairs(rows: Rows, count: int, cosine: float, seed: int = 0) -> np.ndarray:
    """Find pairs [P, 2] of embeddings with a larger cosine than `cosine`.

    Rows of zeros are similar to nothing. Up to 20,000 embeddings, all pairs are compared. Above
    that, k-means makes about sqrt(count) clusters and only pairs within a cluster are compared
    (SemDeDup, 2303.09540), so similar embeddings in different clusters are not found.
    """
    pairs = [np.empty((0, 2), np.int64)]
    for cluster in _clusters(rows, count, seed):
        x = _normalized(rows(cluster))
        for start in range(0, len(x), BLOCK):
            similar = np.triu(x[start : start + BLOCK] @ x[start:].T > cosine, 1)
            pairs.append(cluster[np.argwhere(similar) + start])
    return np.concatenate(pairs)


def _clusters(rows: Rows, count: int, seed: int) -> list[np.ndarray]:
    """Cluster embeddings by spherical k-means on a sample; return the positions per cluster."""
    if count <= EXACT_BELOW:
        return [np.arange(count)]
    rng = np.random.default_rng(seed)
    clusters = int(np.sqrt(count))
    drawn = np.sort(rng.choice(count, min(count, 50 * clusters), replace=False))
    x = _normalized(rows(drawn))
    centres = x[rng.choice(len(x), clusters, replace=False)]
    for _ in range(ROUNDS):
        nearest = _nearest(x, centres)
        order = np.argsort(nearest, kind="stable")
        filled, first = np.unique(nearest[order], return_index=True)
        centres[filled] = _normalized(np.add.reduceat(x[order], first))
    starts = range(0, count, 64 * BLOCK)
    blocks = [np.arange(start, min(start + 64 * BLOCK, count)) for start in starts]
    nearest = np.concatenate([_nearest(_normalized(rows(block)), centres) for block in blocks])
    order = np.argsort(nearest, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(nearest[order])) + 1)


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the number of the nearest centre of each row, [n]."""
    blocks = [x[start : start + BLOCK] for start in range(0, len(x), BLOCK)]
    return np.concatenate([np.argmax(block @ centres.T, axis=1) for block in blocks])


def _normalized(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
