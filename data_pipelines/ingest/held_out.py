"""Choice of the samples that are held out for validation, without near-duplicates in training.

The choice depends only on the content of the samples: not on their names, their order or the number
of processes. A group of near-duplicates (`data_pipelines.decode.near_duplicates`) is held out as a
whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_pipelines.decode.near_duplicates import dhash_of, first_64, near_duplicates
from data_pipelines.ingest.endings import ending_of
from data_pipelines.ingest.listing import Item
from data_pipelines.ingest.table_columns import LABELS
from data_pipelines.shards.tar_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from xray.errors import BadSample, ConfigError
from xray.words import count

T = TypeVar("T")
VAL = "val"  # the folder, below the shards to train on, of those that are held out
LARGEST_SHARE = 0.5
COMPARED = 64  # files to hash at a time
LEAST = 2  # samples of a modality to hold out, because retrieval needs two; at most a half of them


class Stratum(NamedTuple):
    """A modality and a class: the share is held out of each modality, spread over its classes."""

    modality: str
    label: str = ""


class Traits(NamedTuple):
    """Traits of a sample that the choice depends on.

    exact: 64 bits of the sha256 of its picture or clip. dhash: 0 = similar to nothing.
    """

    exact: int
    dhash: int
    stratum: Stratum


def traits_of(media: bytes, ending: str, meta: Mapping[str, Any]) -> Traits:
    """Hash a picture or clip; raises BadSample if it cannot be decoded or is neither."""
    if ending not in IMAGE_EXTENSIONS + VIDEO_EXTENSIONS:
        raise BadSample("unsupported ending", ending)
    is_clip = ending in VIDEO_EXTENSIONS
    label = next((str(meta[key]) for key in LABELS if meta.get(key) not in (None, "")), "")
    exact = first_64(hashlib.sha256(media).digest())
    return Traits(exact, dhash_of(media, is_clip), Stratum("video" if is_clip else "image", label))


@dataclass(frozen=True)
class ItemHasher:
    """Function that hashes a block of files; None for a file that would be skipped."""

    items: list[Item]

    def __len__(self) -> int:
        return -(-len(self.items) // COMPARED)

    def __call__(self, block: int) -> list[Traits | None]:
        own = self.items[block * COMPARED : (block + 1) * COMPARED]
        return [self._traits(item) for item in own]

    def _traits(self, item: Item) -> Traits | None:
        if not item.listed:
            return None
        try:
            return traits_of(item.read(), ending_of(item.name), item.describe()[1])
        except BadSample:
            return None


@dataclass(frozen=True)
class Cut:
    """Positions of the samples that are held out, and how many near-duplicates stay together."""

    held: tuple[int, ...] = ()
    near_duplicates: int = 0  # samples in groups of two or more
    groups: int = 0

    def sides(self, samples: Sequence[T]) -> tuple[list[T], list[T]]:
        """Divide samples into those to train on and those held out, both in their order."""
        held = set(self.held)
        kept = [sample for number, sample in enumerate(samples) if number not in held]
        return kept, [samples[number] for number in self.held]


def check_share(share: float, zero: bool = False) -> None:
    """Raise ConfigError for a share that is not above 0 and at most 0.5; zero: 0 is allowed."""
    if not (0 < share <= LARGEST_SHARE or (zero and share == 0)):
        least = "0 (none)" if zero else "above 0"
        raise ConfigError(f"val={share}: use a share {least} to {LARGEST_SHARE:g}, such as 0.05")


def hold_out(samples: Sequence[Traits | None], share: float) -> Cut:
    """Choose about a share of the samples; those that are None cannot be read and are not chosen.

    A group of near-duplicates counts for the stratum of its member with the smallest hash. In the
    order of these hashes, each group is chosen if it fits what is left of its stratum's quota.
    """
    known = [(number, traits) for number, traits in enumerate(samples) if traits is not None]
    if not known:
        return Cut()
    strata = [traits.stratum for _, traits in known]
    exact = np.array([traits.exact for _, traits in known], np.int64)
    group = near_duplicates(exact, np.array([traits.dhash for _, traits in known], np.int64))
    place = {stratum: number for number, stratum in enumerate(sorted(set(strata)))}
    ties = np.array([place[stratum] for stratum in strata])
    order = np.lexsort((ties, exact.view(np.uint64)))
    _, first = np.unique(group[order], return_index=True)  # each group's smallest hash
    sizes = np.bincount(group)
    left, chosen = quotas(Counter(strata), share), np.zeros(len(sizes), bool)
    for member in order[np.sort(first)].tolist():
        size = int(sizes[group[member]])
        if size <= left[strata[member]]:
            left[strata[member]] -= size
            chosen[group[member]] = True
    numbers = np.array([number for number, _ in known])
    several = sizes[sizes > 1]
    return Cut(tuple(numbers[chosen[group]].tolist()), int(several.sum()), len(several))


def quotas(sizes: Mapping[Stratum, int], share: float) -> dict[Stratum, int]:
    """Return the largest number of samples to hold out of each stratum.

    A modality's number is its rounded share, at least LEAST. Its classes get theirs in proportion,
    rounded down; those with the largest remainders get one more.
    """
    result: dict[Stratum, int] = {}
    for modality in sorted({stratum.modality for stratum in sizes}):
        own = {stratum: n for stratum, n in sorted(sizes.items()) if stratum.modality == modality}
        count = sum(own.values())
        total = max(round(share * count), min(LEAST, count // 2))
        parts = {stratum: divmod(total * n, count) for stratum, n in own.items()}
        result |= {stratum: whole for stratum, (whole, _) in parts.items()}
        by_remainder = sorted(own, key=lambda stratum: (-parts[stratum][1], stratum))
        for stratum in by_remainder[: total - sum(whole for whole, _ in parts.values())]:
            result[stratum] += 1
    return result


def held_out_line(folder: Path, samples: int, cut: Cut) -> str:
    """Report the number of samples that are held out in a folder, and what was kept together."""
    line = f"{folder}: {count(samples, 'sample')} held out for validation"
    if not samples:
        return f"{line}: there are too few, or all are near-duplicates of others"
    if cut.groups:
        groups = count(cut.groups, "group")
        line += f"; {cut.near_duplicates:,} near-duplicates in {groups} stay together"
    return line
