"""What each shard contributes to a curation: tables that processes make, apart from each other.

texts: which texts passed the filters and what entries are in them. left: which of those the
decisions about the whole pool leave. kept: which of those are drawn.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipelines.curation.balance import Matches, draw, hash_texts, take_rows
from data_pipelines.curation.config import CurationConfig
from data_pipelines.curation.filters import (
    NO_MATCH,
    NO_METADATA,
    ONE_TEXT,
    Record,
    Tally,
    Text,
    plain,
    sample_filters,
    text_filters,
)
from data_pipelines.curation.metadata import Metadata
from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.columns import Columns, pack_texts, unpack_texts
from data_pipelines.shards.sidecar import CopySlots, Sidecar
from data_pipelines.shards.source import Source
from data_pipelines.tags.balance import uniform
from data_pipelines.text.captions import Caption, read_captions
from xray.errors import ConfigError

MATCHES = ("hashes", "text_ends", "texts", "entry_ends", "entries")  # the columns of Matches


def language_function(name: str) -> Callable[[str], str]:
    """The function `package.module:function` from a text to its language; raises ConfigError."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module does
        raise ConfigError(f"language={name} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"language={name} is no function")
    return found


@dataclass(frozen=True)
class _Passed:
    """A sample that passed the filters: its value of `filters.per_field`, texts and languages."""

    member: int
    value: str
    texts: list[Text]
    languages: list[int]


@dataclass(frozen=True)
class TextMatcher:
    """Filters and matches the texts of a shard; sent to the processes that do it.

    A table has the columns of Matches, and members [n] int32; same [T] int64, a hash of the text
    but for case and spaces, and values [n] int64, one of the json field `filters.per_field`, where
    they are asked for; read [2] (samples, texts), what each step took, and how often languages
    without metadata occur.
    """

    source: Source
    metadata: Metadata
    config: CurationConfig
    scored: Sidecar | None = None

    def __call__(self, shard: int) -> Columns:
        tally, read, unknown = Tally(), np.zeros(2, np.int64), Counter[str]()
        passed = []
        for member in np.unique(self.source.members(shard)).tolist():
            record, captions = Record(self.source, shard, member, self.scored), []
            try:
                captions = read_captions(record.files, self.config.captions)
                texts = self._filtered(record, captions, tally)
                value = self._value(record)
            except BadSample as error:
                tally.take(error.cause, member, len(captions))
                texts = []
            read += 1, len(captions)
            matched = self._with_metadata(member, texts, tally, unknown)
            if matched:
                passed.append(_Passed(member, value, *map(list, zip(*matched, strict=True))))
        names, name_ends = pack_texts(unknown)
        return {
            **self._matched(shard, passed, tally),
            **tally.columns(),
            "read": read,
            "unknown": names,
            "unknown_ends": name_ends,
            "unknown_counts": np.array([*unknown.values()], np.int64),
        }

    def _filtered(self, record: Record, captions: list[Caption], tally: Tally) -> list[Text]:
        """The texts that pass all filters, at most one where one is to stand for all."""
        for name, keeps in self._sample_filters.items():
            if not keeps(record):
                tally.take(name, record.member, len(captions))
                return []
        texts = [Text(number, caption) for number, caption in enumerate(captions)]
        for name, passes in self._text_filters.items():
            left = [text for text in texts if passes(record, text)]
            tally.take(name, record.member, len(texts) - len(left), bool(texts and not left))
            texts = left
        texts = [replace(text, language=self._language(record, text)) for text in texts]
        if allowed := self.config.filters.languages:
            left = [text for text in texts if text.language in allowed]
            gone = bool(texts and not left)
            tally.take("languages", record.member, len(texts) - len(left), gone)
            texts = left
        if self.config.texts == "one" and len(texts) > 1:
            tally.take(ONE_TEXT, record.member, len(texts) - 1, sample=False)
            texts = [self._one(record, texts)]
        return texts

    def _one(self, record: Record, texts: list[Text]) -> Text:
        """A text drawn by weight, always the same for a seed and a key."""
        shares = np.cumsum([text.caption.weight for text in texts])
        u = uniform(self.config.seed, self.source.identity(record.shard, record.member))
        return texts[min(int(np.searchsorted(shares, u * shares[-1], "right")), len(texts) - 1)]

    def _with_metadata(
        self, member: int, texts: list[Text], tally: Tally, unknown: Counter[str]
    ) -> list[tuple[Text, int]]:
        """(text, the number of its language) of those whose language has metadata."""
        found = []
        for text in texts:
            language = self.metadata.language_of(text.language)
            if language < 0:
                unknown[text.language] += 1
                language = self.metadata.language_of(self.config.fallback)
            if language >= 0:
                found.append((text, language))
        tally.take(NO_METADATA, member, len(texts) - len(found), bool(texts and not found))
        return found

    def _language(self, record: Record, text: Text) -> str:
        if self._detect is not None:
            try:
                return str(self._detect(text.text) or "")
            except Exception as error:
                raise ConfigError(
                    f"language={self.config.language} fails for {text.text[:60]!r} "
                    f"({type(error).__name__}: {error}): have it return '' for no language"
                ) from error
        if self.config.language == "language":
            return text.caption.language
        return str(record.meta.get(self.config.language) or "")

    def _value(self, record: Record) -> str:
        field = self.config.filters.per_field
        value = record.meta.get(field) if field else None
        return "" if value is None else str(value)

    def _matched(self, shard: int, passed: list[_Passed], tally: Tally) -> Columns:
        """The columns of the samples with a match."""
        texts = [text for row in passed for text in row.texts]
        languages = np.array([number for row in passed for number in row.languages], np.int32)
        members = np.array([row.member for row in passed], np.int32)
        entries, entry_ends = self._find([text.text for text in texts], languages)
        matches = Matches(
            hash_texts(self.source.identity(shard, row.member) for row in passed),
            np.cumsum([len(row.texts) for row in passed], dtype=np.int64),
            np.array([text.number for text in texts], np.int32),
            entry_ends,
            entries,
        )
        hit = np.diff(matches.entry_ends, prepend=0) > 0
        found = matches.only(hit)
        for member, before, after in zip(members, matches.sizes, found.sizes, strict=True):
            tally.take(NO_MATCH, int(member), int(before - after), not after)
        some = found.sizes > 0
        columns = {name: getattr(found, name) for name in MATCHES}
        columns |= {"hashes": found.hashes[some], "text_ends": found.text_ends[some]}
        columns["members"] = members[some]
        if self.config.filters.same_text:
            columns["same"] = hash_texts(plain(text.text) for text in texts)[hit]
        if self.config.filters.per_field:
            columns["values"] = hash_texts(row.value for row in passed)[some]
        return columns

    def _find(self, texts: list[str], languages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries in texts of several languages: (entries [M] int32, ends [T] int64)."""
        order = np.argsort(languages, kind="stable")
        found, counts = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for language in np.unique(languages).tolist():
            own = order[languages[order] == language]
            entries, ends = self.metadata.find([texts[place] for place in own], language)
            found.append(entries)
            counts.append(np.diff(ends, prepend=0))
        entries, ends = np.concatenate(found), np.cumsum(np.concatenate(counts))
        return take_rows(entries, ends, np.argsort(order))

    @functools.cached_property
    def _sample_filters(self) -> dict[str, Callable[[Record], bool]]:
        return sample_filters(self.config.filters)

    @functools.cached_property
    def _text_filters(self) -> dict[str, Callable[[Record, Text], bool]]:
        return text_filters(self.config.filters)

    @functools.cached_property
    def _detect(self) -> Callable[[str], str] | None:
        name = self.config.language
        return language_function(name) if ":" in name else None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}


def unknown_languages(table: Mapping[str, np.ndarray]) -> Counter[str]:
    """How many texts of a shard are in each language that has no metadata."""
    names = unpack_texts(table["unknown"], table["unknown_ends"])
    return Counter(dict(zip(names, table["unknown_counts"].tolist(), strict=True)))


@dataclass(frozen=True)
class TextTables:
    """The texts of all shards that are left, where left is None all that were matched."""

    texts: Sidecar
    left: Sidecar | None = None

    @property
    def digest(self) -> str:
        return self.texts.digest + (self.left.digest if self.left is not None else "")

    def members(self, shard: int) -> np.ndarray:
        """The members that a shard's matches are of, be they left or not."""
        return self.texts.table(shard)["members"]

    def matches(self, shard: int) -> Matches:
        table = self.texts.table(shard)
        matches = Matches(*(table[name] for name in MATCHES))
        return matches if self.left is None else matches.only(self.left.table(shard)["texts"] > 0)

    def __iter__(self) -> Iterator[Matches]:
        return map(self.matches, range(len(self.texts.counts)))


@dataclass(frozen=True)
class Sampler:
    """Draws the texts of a shard; sent to the processes that do it.

    A table of slots: members [k] int32 and copies [k] int32 (all 0); text_ends [k] int64, where
    each one's texts end in texts [K] int32, their numbers among the sample's captions, and rows [K]
    int32, their places among the shard's matches.
    """

    pool: TextTables
    rates: np.ndarray
    seed: int

    def __call__(self, shard: int) -> Columns:
        matches = self.pool.matches(shard)
        drawn = draw(matches, self.rates, self.seed)
        sizes = np.bincount(matches.sample_of[drawn], minlength=len(matches.hashes))
        members = self.pool.members(shard)[sizes > 0]
        return {
            "members": members,
            "copies": np.zeros(len(members), np.int32),
            "text_ends": np.cumsum(sizes[sizes > 0]),
            "texts": matches.texts[drawn],
            "rows": np.flatnonzero(drawn).astype(np.int32),
        }


class KeptSlots(CopySlots):
    """The samples that a curation keeps, as slots of their source, and which texts it keeps."""

    def texts(self, shard: int, slot: int) -> np.ndarray:
        """Numbers of a slot's texts among the captions of its sample."""
        table = self.sidecar.table(shard)
        start = int(table["text_ends"][slot - 1]) if slot else 0
        return table["texts"][start : int(table["text_ends"][slot])]
