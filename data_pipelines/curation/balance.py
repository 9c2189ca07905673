"""Balanced sampling of texts by metadata entries (MetaCLIP 2309.16671, Meta CLIP 2 2507.22062).

Entry e of the metadata matches count_e texts. Each match is drawn with probability
p_e = min(1, t / count_e). A text is kept if at least one of its matches is drawn:
P = 1 - prod_e (1 - p_e). So all texts with rare entries are kept, and about t texts for each
frequent entry. The size of the arrays does not depend on the size of the pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.stream.shuffle import keys_of, mixed, steps


@dataclass(frozen=True)
class Matches:
    """Texts of n samples, and the entries that match each text.

    hashes: hash of each sample, [n] int64. text_ends: end of each sample in `texts`, [n]. texts:
    number of each text in its sample, [T] int32. entry_ends: end of each text in `entries`, [T].
    entries: number of the entry of each match, [M] int32.
    """

    hashes: np.ndarray
    text_ends: np.ndarray
    texts: np.ndarray
    entry_ends: np.ndarray
    entries: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Number of texts of each sample, [n]."""
        return np.diff(self.text_ends, prepend=0)

    @property
    def sample_of(self) -> np.ndarray:
        """Row of the sample of each text, [T]."""
        return rows_of(self.text_ends)

    def only(self, texts: np.ndarray) -> Matches:
        """Return the same samples with only the texts that a mask [T] bool selects."""
        entries, entry_ends = take_rows(self.entries, self.entry_ends, np.flatnonzero(texts))
        text_ends = np.cumsum(np.bincount(self.sample_of[texts], minlength=len(self.hashes)))
        return Matches(self.hashes, text_ends, self.texts[texts], entry_ends, entries)


def count_entries(pool: Iterable[Matches], entries: int) -> np.ndarray:
    """Count the texts that match each entry, [E] int64."""
    counts = np.zeros(entries, np.int64)
    for matches in pool:
        counts += np.bincount(matches.entries, minlength=entries)
    return counts


def tail_share(counts: np.ndarray, t: float) -> float:
    """Return the share of matches whose entries have a count below t."""
    total = int(counts.sum())
    return float(counts[counts < t].sum() / total) if total else 0.0


def threshold_for(counts: np.ndarray, share: float) -> float:
    """Find the threshold t for which rare entries have a given share of the matches.

    The counts are sorted and cumulated. The threshold is the count at which the cumulated share is
    closest to the given one (Meta CLIP 2).
    """
    ordered = np.sort(counts[counts > 0])
    if not len(ordered):
        return 1.0
    shares = np.cumsum(ordered) / ordered.sum()
    return float(ordered[np.argmin(np.abs(shares - share))])


@dataclass(frozen=True)
class Balance:
    """Counts, thresholds and rates of the sampling."""

    counts: np.ndarray  # texts that match each entry, [E] int64
    thresholds: tuple[float, ...]  # t of each language
    rates: np.ndarray  # p_e, [E]


def balance(
    counts: np.ndarray, languages: Sequence[slice], t: float, reference: int = -1
) -> Balance:
    """Compute the thresholds and rates of the entries of each language.

    languages: slice of the entries of each language. reference: number of the language that t
    applies to; -1 = all languages. For every other language, t is computed so that rare entries
    have the same share of the matches as in the reference language.
    """
    thresholds = [t] * len(languages)
    if reference >= 0:
        share = tail_share(counts[languages[reference]], t)
        thresholds = [threshold_for(counts[entries], share) for entries in languages]
        thresholds[reference] = t
    parts = [keep_rates(counts[e], t) for e, t in zip(languages, thresholds, strict=True)]
    return Balance(counts, tuple(thresholds), np.concatenate(parts))


def keep_rates(counts: np.ndarray, t: float) -> np.ndarray:
    """Compute p_e = min(1, t / count_e), [E] float64."""
    return np.minimum(1.0, t / np.maximum(counts, 1))


def draw(matches: Matches, rates: np.ndarray, seed: int) -> np.ndarray:
    """Draw the texts to keep, [T] bool.

    rates: p_e of all entries. Each draw is a hash of (seed, sample, text, entry), so it does not
    depend on the order of samples.
    """
    samples = matches.hashes[matches.sample_of].view(np.uint64)
    text_keys = derive_keys(samples, seed, matches.texts)
    text_rows = rows_of(matches.entry_ends)
    passed = uniforms(text_keys[text_rows], matches.entries) < rates[matches.entries]
    kept = np.zeros(len(matches.texts), bool)
    kept[text_rows[passed]] = True
    return kept


def derive_keys(hashes: np.ndarray, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Derive a uint64 key from each (hash, seed, number), [n]."""
    return mixed((hashes ^ keys_of([seed], np.zeros(1))) + steps(numbers))


def uniforms(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Derive a random number in [0, 1) from each (key, number), [n] float64."""
    return (mixed(keys + steps(numbers)) >> np.uint64(11)) * 2.0**-53


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """Hash each text to 64 bits with blake2b, [n] int64."""
    encoded = (text.encode("utf-8", "surrogateescape") for text in texts)
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in encoded)
    return np.frombuffer(digests, np.int64)


# rows of different lengths --------------------------------------------------------------------


def rows_of(ends: np.ndarray) -> np.ndarray:
    """Return the row of each value, for rows that end at `ends`."""
    return np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))


def take_rows(
    values: np.ndarray, ends: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Select rows of different lengths; returns their (values, ends)."""
    sizes = np.diff(ends, prepend=0)
    firsts, taken = (ends - sizes)[rows], sizes[rows]
    new_ends = np.cumsum(taken)
    positions = np.arange(taken.sum()) + np.repeat(firsts - (new_ends - taken), taken)
    return values[positions], new_ends
