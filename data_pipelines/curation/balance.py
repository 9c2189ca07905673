"""Balanced sampling of texts by the entries in them (MetaCLIP 2309.16671, Meta CLIP 2 2507.22062).

count_e texts match entry e, which lets each of them through with p_e = min(1, t / count_e). A text
is kept if any of its entries lets it through: P = 1 - prod_e (1 - p_e). So texts with rare entries
are all kept, and of those with frequent ones about t per entry. Nothing here grows with the pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.stream.shuffle import keys_of, mixed, steps


@dataclass(frozen=True)
class Matches:
    """Texts of some samples, and the entries in each.

    hashes [n] int64: of the samples. text_ends [n]: where each sample's texts end in `texts` [T]
    int32, their numbers within the sample. entry_ends [T]: where each text's entries end in
    `entries` [M] int32.
    """

    hashes: np.ndarray
    text_ends: np.ndarray
    texts: np.ndarray
    entry_ends: np.ndarray
    entries: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Each sample's number of texts, [n]."""
        return np.diff(self.text_ends, prepend=0)

    @property
    def sample_of(self) -> np.ndarray:
        """Each text's sample, [T]."""
        return rows_of(self.text_ends)

    def only(self, texts: np.ndarray) -> Matches:
        """The same samples with the texts of a mask, [T] bool."""
        entries, entry_ends = take_rows(self.entries, self.entry_ends, np.flatnonzero(texts))
        text_ends = np.cumsum(np.bincount(self.sample_of[texts], minlength=len(self.hashes)))
        return Matches(self.hashes, text_ends, self.texts[texts], entry_ends, entries)


def count_entries(pool: Iterable[Matches], entries: int) -> np.ndarray:
    """How many texts match each entry, [E] int64."""
    counts = np.zeros(entries, np.int64)
    for matches in pool:
        counts += np.bincount(matches.entries, minlength=entries)
    return counts


def tail_share(counts: np.ndarray, t: float) -> float:
    """The share of matches that are of entries with a count below t."""
    whole = int(counts.sum())
    return float(counts[counts < t].sum() / whole) if whole else 0.0


def threshold_for(counts: np.ndarray, share: float) -> float:
    """The count up to which an entry is rare if rare ones are to have a share of the matches.

    Of the sorted counts the one at which the cumulated share is closest (Meta CLIP 2).
    """
    ordered = np.sort(counts[counts > 0])
    if not len(ordered):
        return 1.0
    shares = np.cumsum(ordered) / ordered.sum()
    return float(ordered[np.argmin(np.abs(shares - share))])


@dataclass(frozen=True)
class Balance:
    """What each entry lets through.

    counts: texts that match it, [E] int64. thresholds: t of each language. rates: p_e, [E].
    """

    counts: np.ndarray
    thresholds: tuple[float, ...]
    rates: np.ndarray


def balance(
    counts: np.ndarray, languages: Sequence[slice], t: float, reference: int = -1
) -> Balance:
    """Thresholds and rates of the entries of each language.

    reference: the language that t is for; the others get the one that leaves them the same share of
    matches with rare entries. -1 = t is for all.
    """
    thresholds = [t] * len(languages)
    if reference >= 0:
        share = tail_share(counts[languages[reference]], t)
        thresholds = [threshold_for(counts[own], share) for own in languages]
        thresholds[reference] = t
    parts = [keep_rates(counts[o], t) for o, t in zip(languages, thresholds, strict=True)]
    return Balance(counts, tuple(thresholds), np.concatenate(parts))


def keep_rates(counts: np.ndarray, t: float) -> np.ndarray:
    """p_e = min(1, t / count_e), [E] float64."""
    return np.minimum(1.0, t / np.maximum(counts, 1))


def draw(matches: Matches, rates: np.ndarray, seed: int) -> np.ndarray:
    """Which texts an entry lets through, [T] bool.

    rates: p_e of all entries. A draw is a hash of (seed, sample, text, entry).
    """
    samples = matches.hashes[matches.sample_of].view(np.uint64)
    of_texts = keyed(samples, seed, matches.texts)
    texts = rows_of(matches.entry_ends)
    lets = uniforms(of_texts[texts], matches.entries) < rates[matches.entries]
    kept = np.zeros(len(matches.texts), bool)
    kept[texts[lets]] = True
    return kept


def keyed(hashes: np.ndarray, seed: int, numbers: np.ndarray) -> np.ndarray:
    """A uint64 per (hash, seed, number), [n]."""
    return mixed((hashes ^ keys_of([seed], np.zeros(1))) + steps(numbers))


def uniforms(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A number in [0, 1) per (key, number), [n] float64."""
    return (mixed(keys + steps(numbers)) >> np.uint64(11)) * 2.0**-53


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """64 bits of the blake2b of each text, [n] int64."""
    encoded = (text.encode("utf-8", "surrogateescape") for text in texts)
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in encoded)
    return np.frombuffer(digests, np.int64)


# rows of different lengths --------------------------------------------------------------------


def rows_of(ends: np.ndarray) -> np.ndarray:
    """Each value's row, where rows end so."""
    return np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))


def take_rows(
    values: np.ndarray, ends: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(values, ends) of some rows."""
    sizes = np.diff(ends, prepend=0)
    firsts, taken = (ends - sizes)[rows], sizes[rows]
    new_ends = np.cumsum(taken)
    places = np.arange(taken.sum()) + np.repeat(firsts - (new_ends - taken), taken)
    return values[places], new_ends
