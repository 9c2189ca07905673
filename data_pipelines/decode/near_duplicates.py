"""Near-duplicates of pictures and clips: a 64-bit perceptual hash, and groups of close hashes."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from PIL import Image

from data_pipelines.decode.decoders import FrameChoice
from data_pipelines.decode.images import decode_image
from data_pipelines.decode.sandbox import clip_decoder
from xray.config import DataConfig

COARSE = (72, 64)  # pixels to decode a JPEG at, 8 for each value of the 9 x 8 grid of a dHash
LOG2_BUCKET = 0  # log2 of the number of random hashes that may agree in the selected bands
# Bits of the dHash in which near-duplicates differ at most. Of 1,000 photos, 97 % were found again
# at half the size, as JPEG of quality 40, or with 1 % cut off each side, and 85 % with 2 % cut off;
# of 25 million pairs of different photos, 10 were this close.
NEAR = 6


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


def dhash_of(media: bytes, is_clip: bool) -> int:
    """Compute the dHash of a picture, or of the middle frame of a clip; raises BadSample."""
    if not is_clip:
        return dhash(decode_image(media, at_least=COARSE))
    clip = clip_decoder(DataConfig()).decode(media, FrameChoice(1))
    return dhash(Image.fromarray(clip.pixels[0]))


def near_duplicates(exact: np.ndarray, dhashes: np.ndarray, distance: int = NEAR) -> np.ndarray:
    """Return the first sample of the group of near-duplicates of each sample, [N].

    Samples are in one group if their `exact` hashes (int64 [N]) are equal, or if their `dhashes`
    (int64 [N]) differ in at most `distance` bits; a dHash of 0 is similar to nothing. Similarity is
    transitive: near-duplicates of near-duplicates join the same group.
    """
    own = np.arange(len(exact))
    _, first, same = np.unique(exact, return_index=True, return_inverse=True)
    seen = own[dhashes != 0]
    values, at, alike = np.unique(
        dhashes[seen].view(np.uint64), return_index=True, return_inverse=True
    )
    links = [
        np.stack([own, first[same]], axis=1),
        np.stack([seen, seen[at][alike]], axis=1),
        seen[at][near_values(values, distance)],
    ]
    return components(len(exact), np.concatenate(links))


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
