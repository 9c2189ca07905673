"""Deduplication: by the bytes of the media, by a perceptual hash, or by embeddings.

The pool is compared by 64-bit hashes, which need 8 bytes per sample and kind, and about 50 bytes
while they are sorted. With 10^8 samples, the probability that any two different ones share 64 bits
of their sha256 is 3e-4. A dHash is less specific: images with little content share few values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from PIL import Image

from data_pipelines.curation.filters import read_media
from data_pipelines.decode.decoders import FrameChoice, decode_image
from data_pipelines.decode.sandbox import clip_decoder
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import metadata_of
from xray.config import DataConfig
from xray.errors import BadSample

COARSE = (72, 64)  # pixels to decode a JPEG at, 8 for each value of the 9 x 8 grid of a dHash
LOG2_BUCKET = 0  # log2 of the number of random hashes that may agree in the selected bands
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
            return exact, dhash(self._image(media)) if self.perceptual else 0, 0
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

    def _image(self, media: bytes) -> Image.Image:
        """Decode an image, or the middle frame of a clip."""
        if self.source.modality == "image":
            return decode_image(media, at_least=COARSE)
        clip = clip_decoder(DataConfig()).decode(media, FrameChoice(1))
        return Image.fromarray(clip.pixels[0])


def first_64(digest: bytes) -> int:
    """Convert the first 8 bytes of a digest to int64."""
    return int.from_bytes(digest[:8], "little", signed=True)


def dhash(image: Image.Image) -> int:
    """Compute the difference hash of an image: 64 bits as int64.

    A bit is 1 if brightness increases from left to right between two neighbours in a 9 x 8 grid of
    greys. 0 means that it increases nowhere.
    """
    greys = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return first_64(np.packbits(greys[:, 1:] > greys[:, :-1]).tobytes())


# pairs and groups -----------------------------------------------------------------------------


def near_values(values: np.ndarray, distance: int) -> np.ndarray:
    """Find all pairs of distinct uint64 values that differ in at most `distance` bits.

    Returns pairs of positions in `values`, [P, 2]. The 64 bits are cut into k bands. Two values
    that differ in r bits agree in at least k - r bands. So for each choice of k - r bands, the
    values are grouped by these bands, and only values of the same group are compared. k is the
    smallest number for which the groups are small.
    """
    bands, needed = distance + 1, np.log2(len(values) + 1) - LOG2_BUCKET
    while bands < distance + 4 and 64 * (bands - distance) / bands < needed:
        bands += 1
    edges = np.linspace(0, 64, bands + 1).astype(int).tolist()
    masks = [((1 << b) - 1) ^ ((1 << a) - 1) for a, b in pairwise(edges)]
    pairs = [np.empty((0, 2), np.int64)]
    if distance:
        for selected in combinations(masks, bands - distance):
            pairs.append(_near_in_bands(values, np.uint64(sum(selected)), distance))
    return np.unique(np.concatenate(pairs), axis=0)


def _near_in_bands(values: np.ndarray, mask: np.uint64, distance: int) -> np.ndarray:
    """Find the pairs of `near_values` whose bits under a mask are equal, [P, 2]."""
    order = np.argsort(values & mask)
    masked = (values & mask)[order]
    result = [np.empty((0, 2), np.int64)]
    left, gap = np.arange(len(order)), 1
    while len(left):  # compare elements that are `gap` apart in sorted order, within a group
        left = left[left + gap < len(order)]
        left = left[masked[left] == masked[left + gap]]
        pairs = np.stack([order[left], order[left + gap]], axis=1)
        near = np.bitwise_count(values[pairs[:, 0]] ^ values[pairs[:, 1]]) <= distance
        result.append(np.sort(pairs[near], axis=1))
        gap += 1
    return np.concatenate(result)


def components(count: int, pairs: np.ndarray) -> np.ndarray:
    """Return the smallest node connected to each node, [count], by edges `pairs` [P, 2]."""
    parent = np.arange(count)
    while True:
        roots = parent[pairs]
        least = roots.min(axis=1)
        np.minimum.at(parent, roots.ravel(), np.repeat(least, 2))
        before, parent = parent, parent[parent]
        if np.array_equal(parent, before) and (parent[pairs] == parent[pairs[:, :1]]).all():
            return parent


def groups_of(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Number the groups of hashes (int64) that distances up to `distance` bits connect, [N]."""
    values, group = np.unique(hashes.view(np.uint64), return_inverse=True)
    return components(len(values), near_values(values, distance))[group]


def is_near(hashes: np.ndarray, others: np.ndarray, distance: int) -> np.ndarray:
    """Mark hashes (int64) that differ in at most `distance` bits from one of the others, [N]."""
    values, row = np.unique(hashes.view(np.uint64), return_inverse=True)
    other_values = np.unique(others.view(np.uint64))
    hit = np.isin(values, other_values)
    if distance:
        union = np.unique(np.concatenate([values, other_values]))
        is_other = np.isin(union, other_values)
        pairs = near_values(union, distance)
        near = np.concatenate([pairs[is_other[pairs[:, 1]], 0], pairs[is_other[pairs[:, 0]], 1]])
        hit |= np.isin(values, union[near])
    return hit[row]


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
