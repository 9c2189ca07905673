"""Which samples are the same: by the bytes of their media, by how they look, by an embedding.

The pool is compared by 64-bit hashes: 8 bytes per sample and kind, and some 50 while they are
sorted. Among 10^8 samples, two that differ share 64 bits of a sha256 with probability 3e-4; a dHash
says less, and pictures with little in them have few different ones.
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
from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import metadata_of
from xray.config import DataConfig

COARSE = (72, 64)  # pixels that a JPEG may be decoded at: 8 for each of the 9 x 8
FULL = 0  # log2 of the random hashes that there may be with the same bands
EXACT_BELOW = 20_000  # embeddings that are all compared with each other
BLOCK = 1024  # rows of embeddings that are compared at once
ROUNDS = 10  # of k-means
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # set bits of a byte


# hashes of one sample -------------------------------------------------------------------------


@dataclass(frozen=True)
class MediaHasher:
    """Hashes of a shard's media; sent to the processes that take them.

    A table: members [n] int32, exact [n] int64 (of the sha256), perceptual [n] int64 (dHash; 0
    where it is not asked for, or says nothing), broken [n] uint8 (those have no hashes).
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
        """(exact, perceptual, whether it is broken)."""
        try:
            exact = self._recorded(shard, member) if self.sha256 == "json" else None
            if exact is not None and not self.perceptual:
                return exact, 0, 0
            media = read_media(self.source, shard, member)
            if exact is None:
                exact = first_64(hashlib.sha256(media).digest())
            return exact, dhash(self._picture(media)) if self.perceptual else 0, 0
        except BadSample:
            return 0, 0, 1

    def _recorded(self, shard: int, member: int) -> int | None:
        noted = metadata_of(self.source.read(shard, member, ("json",))).get("sha256")
        try:
            return first_64(bytes.fromhex(noted)) if isinstance(noted, str) and noted else None
        except ValueError:  # no hexadecimal digits
            return None

    def _picture(self, media: bytes) -> Image.Image:
        if self.source.modality == "image":
            return decode_image(media, at_least=COARSE)
        data = DataConfig()
        clip = clip_decoder(data.decode_seconds, data.decode_gb).decode(media, FrameChoice(1))
        return Image.fromarray(clip.pixels[0])


def first_64(digest: bytes) -> int:
    """The first 8 bytes of a digest, as int64."""
    return int.from_bytes(digest[:8], "little", signed=True)


def dhash(picture: Image.Image) -> int:
    """64 bits, as int64: where brightness grows from left to right in 9 x 8 greys; 0 = nowhere."""
    greys = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX))
    return first_64(np.packbits(greys[:, 1:] > greys[:, :-1]).tobytes())


# pairs and groups -----------------------------------------------------------------------------


def ones(x: np.ndarray) -> np.ndarray:
    """Set bits of each uint64, [n]."""
    return _ONES[np.ascontiguousarray(x).view(np.uint8).reshape(-1, 8)].sum(1)


def near_values(values: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of distinct uint64 values that differ in at most `distance` bits: [P, 2] places.

    The bits are cut into k bands. Two values that differ in r bits agree in k - r of them at
    least, so for each choice of k - r bands the values are sorted by those. k is the least that
    leaves few values with the same bands.
    """
    bands, wanted = distance + 1, np.log2(len(values) + 1) - FULL
    while bands < distance + 4 and 64 * (bands - distance) / bands < wanted:
        bands += 1
    edges = np.linspace(0, 64, bands + 1).astype(int).tolist()
    masks = [((1 << b) - 1) ^ ((1 << a) - 1) for a, b in pairwise(edges)]
    found = [np.empty((0, 2), np.int64)]
    if distance:
        for kept in combinations(masks, bands - distance):
            found.append(_near_by(values, np.uint64(sum(kept)), distance))
    return np.unique(np.concatenate(found), axis=0)


def _near_by(values: np.ndarray, mask: np.uint64, distance: int) -> np.ndarray:
    """Those pairs whose bits under a mask are equal."""
    order = np.argsort(values & mask)
    same = (values & mask)[order]
    found = [np.empty((0, 2), np.int64)]
    left, gap = np.arange(len(order)), 1
    while len(left):  # neighbours, then those two apart, while any bucket is that large
        left = left[left + gap < len(order)]
        left = left[same[left] == same[left + gap]]
        pairs = np.stack([order[left], order[left + gap]], axis=1)
        near = ones(values[pairs[:, 0]] ^ values[pairs[:, 1]]) <= distance
        found.append(np.sort(pairs[near], axis=1))
        gap += 1
    return np.concatenate(found)


def components(count: int, pairs: np.ndarray) -> np.ndarray:
    """The least member of each one's group, [count], where pairs [P, 2] are of one group."""
    parent = np.arange(count)
    while True:
        roots = parent[pairs]
        least = roots.min(axis=1)
        np.minimum.at(parent, roots.ravel(), np.repeat(least, 2))
        before, parent = parent, parent[parent]
        if np.array_equal(parent, before) and (parent[pairs] == parent[pairs[:, :1]]).all():
            return parent


def groups_of(hashes: np.ndarray, distance: int) -> np.ndarray:
    """A group's number for each hash (int64), [N]: those that are connected by small distances."""
    values, group = np.unique(hashes.view(np.uint64), return_inverse=True)
    return components(len(values), near_values(values, distance))[group]


def is_near(hashes: np.ndarray, others: np.ndarray, distance: int) -> np.ndarray:
    """Which hashes (int64) differ in at most `distance` bits from one of the others, [N] bool."""
    values, place = np.unique(hashes.view(np.uint64), return_inverse=True)
    theirs = np.unique(others.view(np.uint64))
    hit = np.isin(values, theirs)
    if distance:
        whole = np.unique(np.concatenate([values, theirs]))
        is_other = np.isin(whole, theirs)
        pairs = near_values(whole, distance)
        ours = np.concatenate([pairs[is_other[pairs[:, 1]], 0], pairs[is_other[pairs[:, 0]], 1]])
        hit |= np.isin(values, whole[ours])
    return hit[place]


def repeats(groups: np.ndarray, key_of: Callable[[int], str]) -> np.ndarray:
    """Which are to go so that one of each group is left, the one with the smallest key: [N] bool.

    Equal keys: the first. key_of is asked for those with company only.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(sizes[group] > 1)
    best: dict[int, tuple[str, int]] = {}
    for place, number in zip(shared.tolist(), group[shared].tolist(), strict=True):
        mine = key_of(place), place
        best[number] = min(best.get(number, mine), mine)
    gone = np.zeros(len(groups), bool)
    gone[shared] = True
    gone[[place for _, place in best.values()]] = False
    return gone


# embeddings -----------------------------------------------------------------------------------

Rows = Callable[[np.ndarray], np.ndarray]  # places [k] -> their embeddings [k, D] float32


def similar_pairs(rows: Rows, count: int, cosine: float, seed: int = 0) -> np.ndarray:
    """Pairs [P, 2] of embeddings with a larger cosine; rows of zeros have none.

    All are compared up to 20,000; beyond, those in the same one of about sqrt(count) clusters
    (SemDeDup, 2303.09540): pairs that a cluster's border parts are not found.
    """
    found = [np.empty((0, 2), np.int64)]
    for bucket in _buckets(rows, count, seed):
        x = _normalized(rows(bucket))
        for start in range(0, len(x), BLOCK):
            close = np.triu(x[start : start + BLOCK] @ x[start:].T > cosine, 1)
            found.append(bucket[np.argwhere(close) + start])
    return np.concatenate(found)


def _buckets(rows: Rows, count: int, seed: int) -> list[np.ndarray]:
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
        filled, starts = np.unique(nearest[order], return_index=True)
        centres[filled] = _normalized(np.add.reduceat(x[order], starts))
    places = range(0, count, 64 * BLOCK)
    blocks = [np.arange(start, min(start + 64 * BLOCK, count)) for start in places]
    nearest = np.concatenate([_nearest(_normalized(rows(block)), centres) for block in blocks])
    order = np.argsort(nearest, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(nearest[order])) + 1)


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    blocks = [x[start : start + BLOCK] for start in range(0, len(x), BLOCK)]
    return np.concatenate([np.argmax(block @ centres.T, axis=1) for block in blocks])


def _normalized(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
