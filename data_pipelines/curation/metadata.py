"""Metadata: entries that texts are matched with, from files or from n-grams of the pool.

MetaCLIP uses the synsets of WordNet, and frequent words, word pairs and titles of Wikipedia
(2309.16671, table 1). Meta CLIP 2 uses the same for each language (2507.22062).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipelines.curation.phrase_matcher import PhraseMatcher
from data_pipelines.shards.process_pool import over_shards
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.tags.concept_matcher import spaced
from data_pipelines.text.captions import captions_of
from data_pipelines.text.stop_words import stop_words
from xray.config import nearest
from xray.config.identity import hash_json
from xray.errors import BadSample, ConfigError
from xray.files import lines_of, read_text, write_in_place
from xray.records import parse_record

EVERY = ""  # language of metadata for texts of all languages
ALL_TEXTS = ((EVERY, ("(any text)",)),)  # metadata=none: one entry, which matches every text
MOST_PAIRS = 5_000_000  # words, and pairs, counted at a time; above it, the rarest are dropped


@dataclass(frozen=True)
class Metadata:
    """Entries by language; the number of an entry is its position in all lists together.

    lists: (language, entries) of each language; a single list of the language "" is for all texts.
    casefold: True = entries are casefolded, and texts must be too.
    """

    lists: tuple[tuple[str, tuple[str, ...]], ...]
    casefold: bool = False

    @functools.cached_property
    def languages(self) -> list[str]:
        """Names of the languages, [L]."""
        return [language for language, _ in self.lists]

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """End of the entries of each language, [L] int64."""
        return np.cumsum([len(entries) for _, entries in self.lists], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all entries."""
        return hash_json([[[name, list(entries)] for name, entries in self.lists], self.casefold])

    def entry(self, number: int) -> tuple[str, str]:
        """Return (language, entry) of an entry number."""
        index = int(self.languages_of(np.array([number]))[0])
        language, entries = self.lists[index]
        return language, entries[number - self.slice(index).start]

    def languages_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the language number of each entry number, [n]."""
        return np.searchsorted(self.ends, numbers, side="right")

    def language_of(self, language: str) -> int:
        """Return the number of the list for texts of a language; -1 if there is none."""
        if self.languages == [EVERY]:
            return 0
        return self.languages.index(language) if language in self.languages else -1

    def of(self, language: str, key: str) -> int:
        """Return the number of the language that the setting `key` names; raises ConfigError."""
        if language not in self.languages:
            names = ", ".join(self.languages) if self.languages != [EVERY] else "one list for all"
            raise ConfigError(
                f"{key}={language}: the metadata do not have this language; they have {names}"
                f"{nearest(language, self.languages)}"
            )
        return self.languages.index(language)

    def slice(self, language: int) -> slice:
        """Return the slice of the entries of a language."""
        return slice(int(self.ends[language - 1]) if language else 0, int(self.ends[language]))

    @property
    def all_texts(self) -> bool:
        """True if every text matches (metadata=none), so that nothing is balanced."""
        return self.lists == ALL_TEXTS

    def find(self, texts: Sequence[str], language: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the entries in each text: (entry numbers [M] int32, ends [n] int64)."""
        if self.all_texts:
            return np.zeros(len(texts), np.int32), np.arange(1, len(texts) + 1)
        if self.casefold:
            texts = [text.casefold() for text in texts]
        numbers, ends = self._matcher(language).find(texts)
        return numbers + np.int32(self.slice(language).start), ends

    @functools.cached_property
    def _matcher(self) -> Callable[[int], PhraseMatcher]:
        return functools.cache(lambda language: PhraseMatcher(self.lists[language][1]))

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "_matcher"}


def make_metadata(lists: Mapping[str, Iterable[str]], casefold: bool = False) -> Metadata:
    """Make metadata from entries, stripped and unique; raises ConfigError for an empty list."""
    result = []
    for language, entries in lists.items():
        spelled = (entry.casefold() if casefold else entry for entry in map(str.strip, entries))
        unique = tuple(dict.fromkeys(filter(None, spelled)))
        if not unique:
            which = f" of language {language!r}" if language else ""
            raise ConfigError(f"the metadata{which} have no entries: write one per line")
        result.append((language, unique))
    if not result:
        raise ConfigError("the metadata have no entries: write one per line")
    return Metadata(tuple(result), casefold)


def read_metadata(path: str, casefold: bool = False) -> Metadata:
    """Read metadata from a file: one entry per line, or (.json) a list or {language: list}.

    The path "none" gives one entry that matches every text. Raises ConfigError for a file that
    cannot be read or decoded, or has no entries.
    """
    if path == "none":
        return Metadata(ALL_TEXTS)
    text = read_text(path, "metadata")
    if not path.endswith(".json"):
        lists: object = {EVERY: lines_of(text)}
    else:
        try:
            lists = parse_record(text, object)
        except ValueError as error:
            raise ConfigError(f"metadata={path} is not JSON: {error}") from error
        lists = {EVERY: lists} if isinstance(lists, list) else lists
    if not isinstance(lists, dict) or not all(map(_is_list, lists.values())):
        raise ConfigError(f"metadata={path} is neither a list of texts nor {{language: list}}")
    try:
        return make_metadata(lists, casefold)
    except ConfigError as error:
        raise ConfigError(f"metadata={path}: {error}") from error


def _is_list(entries: object) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)


def write_metadata(metadata: Metadata, path: Path) -> None:
    """Write metadata to a file: one entry per line, or JSON if there are languages."""
    if metadata.languages == [EVERY]:
        text = "".join(f"{entry}\n" for entry in metadata.lists[0][1])
    else:
        lists = {language: list(entries) for language, entries in metadata.lists}
        text = json.dumps(lists, ensure_ascii=False, indent=0)
    write_in_place(path, text)


# counted from the pool ------------------------------------------------------------------------


@dataclass
class NgramConfig:
    """Rules that select words and word pairs of the pool as entries."""

    min_count: int = 100  # words and pairs with fewer occurrences are left out
    min_pmi: float = 10.0  # least pointwise mutual information of the words of a pair, in bits
    max_words: int = 250_000  # keep at most this number of words, the most frequent ones
    max_pairs: int = 100_000  # keep at most this number of pairs, the most frequent ones
    # languages (de, en, es, fr, it, nl, pt) and .txt files; their words are no entry, nor the first
    # or last word of a pair
    stop_words: list[str] = field(default_factory=list)


@dataclass
class NgramCounts:
    """Counts of words and of pairs of neighbouring words."""

    words: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, text: str) -> None:
        """Count the words of a text, and its word pairs without punctuation between them."""
        words = [word if any(map(str.isalnum, word)) else "" for word in spaced(text).split()]
        self.words.update(filter(None, words))
        self.pairs.update((a, b) for a, b in pairwise(words) if a and b)

    def join(self, other: NgramCounts) -> None:
        """Add other counts, in place; above MOST_PAIRS, the rarest are dropped."""
        self.words.update(other.words)
        self.pairs.update(other.pairs)
        self.words, self.pairs = _cut(self.words), _cut(self.pairs)

    def entries(self, config: NgramConfig) -> list[str]:
        """Return frequent words, then frequent pairs with log2 p(a, b) / (p(a) p(b)) >= min_pmi."""
        stop = stop_words(config.stop_words)
        counted = [word for word, n in _ordered(self.words) if n >= config.min_count]
        words = [word for word in counted if word.casefold() not in stop]
        all_words, all_pairs = self.words.total(), self.pairs.total()

        def pmi(a: str, b: str) -> float:
            by_chance = self.words[a] * self.words[b] / all_words**2
            return math.log2(self.pairs[a, b] / all_pairs / by_chance) if by_chance else -math.inf

        pairs = [
            f"{a} {b}"
            for (a, b), n in _ordered(self.pairs)
            if n >= config.min_count and pmi(a, b) >= config.min_pmi
            if not {a.casefold(), b.casefold()} & stop
        ]
        return words[: config.max_words] + pairs[: config.max_pairs]


def _ordered(counts: Counter) -> list:
    """Sort (item, count) by descending count, then by spelling."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _cut(counts: Counter) -> Counter:
    """Drop the rarest items if there are more than MOST_PAIRS; half as many stay."""
    if len(counts) <= MOST_PAIRS:
        return counts
    return Counter(dict(_ordered(counts)[: MOST_PAIRS // 2]))


def count_ngrams(source: Source, workers: int = 1) -> NgramCounts:
    """Count words and word pairs of all captions; above 5 million, the rarest are dropped."""
    counts, work = NgramCounts(), functools.partial(_count_shard, source)
    for of_shard in over_shards(work, len(source.manifest), workers):
        counts.join(of_shard)
    return counts


def _count_shard(source: Source, shard: int) -> NgramCounts:
    counts = NgramCounts()
    for member in source.members(shard).tolist():
        with contextlib.suppress(BadSample):
            for text in captions_of(source.read(shard, member, TEXT_FILES)):
                counts.add(text)
    return counts


def build_metadata(
    lists: Iterable[Iterable[str]], counts: NgramCounts, config: NgramConfig
) -> Metadata:
    """Make metadata from lists of entries, such as WordNet's, then words and pairs of the pool."""
    entries = [entry for listed in lists for entry in listed]
    return make_metadata({EVERY: [*entries, *counts.entries(config)]})
