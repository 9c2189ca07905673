"""Metadata: the entries that texts are matched with, from files or counted from the pool's texts.

MetaCLIP's are WordNet's synsets and Wikipedia's frequent words, word pairs and titles (2309.16671,
table 1); Meta CLIP 2's are the same for each language (2507.22062).
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipelines.curation.phrase_matcher import PhraseMatcher
from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.process_pool import over_shards
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.shards.utf8 import read_utf8
from data_pipelines.tags.concept_matcher import spaced
from data_pipelines.text.captions import captions_of
from xray.config import nearest
from xray.config.identity import hash_json
from xray.errors import ConfigError

EVERY = ""  # the language of metadata that are for texts of all languages
ALL_TEXTS = ((EVERY, ("(any text)",)),)  # metadata=none: its entry is in every text
MOST_PAIRS = 5_000_000  # word pairs and words that are counted at once; the rarest go first


@dataclass(frozen=True)
class Metadata:
    """Entries by language; an entry's number is its place in all of them, [E].

    lists: (language, entries); one list of the language "" is for all texts.
    """

    lists: tuple[tuple[str, tuple[str, ...]], ...]
    casefold: bool = False

    @functools.cached_property
    def languages(self) -> list[str]:
        return [language for language, _ in self.lists]

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Where each language's entries end, [L] int64."""
        return np.cumsum([len(entries) for _, entries in self.lists], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @functools.cached_property
    def digest(self) -> str:
        return hash_json([[[name, list(entries)] for name, entries in self.lists], self.casefold])

    def entry(self, number: int) -> tuple[str, str]:
        """(language, entry)."""
        place = int(self.languages_of(np.array([number]))[0])
        language, entries = self.lists[place]
        return language, entries[number - self.slice(place).start]

    def languages_of(self, numbers: np.ndarray) -> np.ndarray:
        """The languages' numbers of entries, [n]."""
        return np.searchsorted(self.ends, numbers, side="right")

    def language_of(self, language: str, fallback: str = "") -> int:
        """The number of the list for texts of a language, -1 = there is none."""
        if self.languages == [EVERY]:
            return 0
        name = language if language in self.languages else fallback
        return self.languages.index(name) if name in self.languages else -1

    def of(self, language: str, key: str) -> int:
        """The number of a language that a setting names; raises ConfigError."""
        if language not in self.languages:
            known = ", ".join(self.languages) if self.languages != [EVERY] else "one list for all"
            raise ConfigError(
                f"{key}={language}: the metadata have no such language but {known}"
                f"{nearest(language, self.languages)}"
            )
        return self.languages.index(language)

    def slice(self, language: int) -> slice:
        """A language's entries."""
        return slice(int(self.ends[language - 1]) if language else 0, int(self.ends[language]))

    @property
    def all_texts(self) -> bool:
        """Whether there is nothing to balance by."""
        return self.lists == ALL_TEXTS

    def find(self, texts: Sequence[str], language: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the entries in each text as (numbers [M] int32, ends [n] int64)."""
        if self.all_texts:
            return np.zeros(len(texts), np.int32), np.arange(1, len(texts) + 1)
        if self.casefold:
            texts = [text.casefold() for text in texts]
        found, ends = self._matcher(language).find(texts)
        return found + np.int32(self.slice(language).start), ends

    def _matcher(self, language: int) -> PhraseMatcher:
        matchers: dict[int, PhraseMatcher] = self.__dict__.setdefault("_matchers", {})
        if language not in matchers:
            matchers[language] = PhraseMatcher(self.lists[language][1])
        return matchers[language]

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "_matchers"}


def make_metadata(lists: Mapping[str, Iterable[str]], casefold: bool = False) -> Metadata:
    """Metadata of stripped entries, each once per language; raises ConfigError for an empty list.

    casefold: entries that differ in case only are one, and texts are casefolded, too.
    """
    made = []
    for language, entries in lists.items():
        spelled = (entry.casefold() if casefold else entry for entry in map(str.strip, entries))
        kept = tuple(dict.fromkeys(filter(None, spelled)))
        if not kept:
            of = f" of language {language!r}" if language else ""
            raise ConfigError(f"the metadata{of} have no entries: give one per line")
        made.append((language, kept))
    if not made:
        raise ConfigError("the metadata have no entries: give one per line")
    return Metadata(tuple(made), casefold)


def read_metadata(path: str, casefold: bool = False) -> Metadata:
    """Metadata from a file: one entry per line, or (.json) a list or {language: list}; "none" for
    one entry that is in every text.

    Raises ConfigError for what cannot be read, is not UTF-8, or holds no entries.
    """
    if path == "none":
        return Metadata(ALL_TEXTS)
    text = read_utf8(path, "metadata")
    if not path.endswith(".json"):
        lists: object = {EVERY: text.split("\n")}
    else:
        try:
            lists = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"metadata={path} is not json: {error}") from error
        lists = {EVERY: lists} if isinstance(lists, list) else lists
    if not _are_lists(lists):
        raise ConfigError(f"metadata={path} is neither a list of texts nor {{language: list}}")
    assert isinstance(lists, dict)
    try:
        return make_metadata(lists, casefold)
    except ConfigError as error:
        raise ConfigError(f"metadata={path}: {error}") from error


def _are_lists(lists: object) -> bool:
    return isinstance(lists, dict) and all(
        isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)
        for entries in lists.values()
    )


def write_metadata(metadata: Metadata, path: Path) -> None:
    """One entry per line, or json where there are languages."""
    if metadata.languages == [EVERY]:
        path.write_text("".join(f"{entry}\n" for entry in metadata.lists[0][1]), "utf-8")
    else:
        lists = {language: list(entries) for language, entries in metadata.lists}
        path.write_text(json.dumps(lists, ensure_ascii=False, indent=0), "utf-8")


# counted from the pool ------------------------------------------------------------------------


@dataclass
class NgramConfig:
    """Which words and word pairs of the pool become entries."""

    min_count: int = 100  # texts' words, and pairs, that are rarer are left out
    min_pmi: float = 10.0  # bits of pointwise mutual information of a pair's words
    max_words: int = 250_000  # the most frequent ones
    max_pairs: int = 100_000


@dataclass
class NgramCounts:
    """How often words, and words side by side, occur."""

    words: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, text: str) -> None:
        """Count a text's words, and pairs that no punctuation is between."""
        words = [word if any(map(str.isalnum, word)) else "" for word in spaced(text).split()]
        self.words.update(filter(None, words))
        self.pairs.update((a, b) for a, b in pairwise(words) if a and b)

    def join(self, other: NgramCounts) -> None:
        """Add another's counts; beyond MOST_PAIRS, the rarest are forgotten."""
        self.words.update(other.words)
        self.pairs.update(other.pairs)
        self.words, self.pairs = _cut(self.words), _cut(self.pairs)

    def entries(self, config: NgramConfig) -> list[str]:
        """Frequent words, then pairs with log2 p(a, b) / (p(a) p(b)) of at least min_pmi."""
        words = [word for word, n in _ordered(self.words) if n >= config.min_count]
        all_words, all_pairs = self.words.total(), self.pairs.total()

        def pmi(a: str, b: str) -> float:
            by_chance = self.words[a] * self.words[b] / all_words**2
            return math.log2(self.pairs[a, b] / all_pairs / by_chance) if by_chance else -math.inf

        pairs = [
            f"{a} {b}"
            for (a, b), n in _ordered(self.pairs)
            if n >= config.min_count and pmi(a, b) >= config.min_pmi
        ]
        return words[: config.max_words] + pairs[: config.max_pairs]


def _ordered(counts: Counter) -> list:
    """By descending count, then by spelling."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _cut(counts: Counter) -> Counter:
    return (
        Counter(dict(_ordered(counts)[: MOST_PAIRS // 2])) if len(counts) > MOST_PAIRS else counts
    )


@dataclass(frozen=True)
class _NgramCounter:
    """Counts the n-grams of a shard; sent to the processes that do it."""

    source: Source
    captions: Mapping[str, float]

    def __call__(self, shard: int) -> NgramCounts:
        counts = NgramCounts()
        for member in self.source.members(shard).tolist():
            try:
                texts = captions_of(self.source.read(shard, member, TEXT_FILES), self.captions)
            except BadSample:
                continue
            for text in texts:
                counts.add(text)
        return counts


def count_ngrams(
    source: Source, captions: Mapping[str, float] | None = None, workers: int = 1
) -> NgramCounts:
    """Words and word pairs of all captions of a source.

    Beyond 5 million different ones the rarest are forgotten, so those counts are lower bounds.
    """
    counts, work = NgramCounts(), _NgramCounter(source, captions or {})
    for more in over_shards(work, len(source.manifest), workers):
        counts.join(more)
    return counts


def build_metadata(
    lists: Iterable[Iterable[str]], counts: NgramCounts, config: NgramConfig, casefold: bool = False
) -> Metadata:
    """The given lists of entries, such as WordNet's, then the pool's words and word pairs."""
    entries = [entry for given in lists for entry in given]
    return make_metadata({EVERY: [*entries, *counts.entries(config)]}, casefold)
