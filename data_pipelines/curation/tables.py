"""Tables of a curation, one per shard; worker processes make them independently.

texts: texts that passed the filters, and the entries that match them. left: the texts that remain
after the decisions about the whole pool. kept: the texts that the sampling draws from these.
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
from data_pipelines.curation.captioned import CAPTIONED, keep_captioned
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
from data_pipelines.curation.uids import is_uid_list, keep_uids
from data_pipelines.shards.columns import Columns, pack_texts, unpack_texts
from data_pipelines.shards.sidecar import CopySlots, Sidecar, open_sidecar
from data_pipelines.shards.source import Source
from data_pipelines.tags.balance import uniform
from data_pipelines.text.captions import Caption, read_captions
from xray.config import DataConfig, SourceConfig
from xray.errors import BadSample, ConfigError

MATCHES = ("hashes", "text_ends", "texts", "entry_ends", "entries")  # the columns of Matches


def language_function(name: str) -> Callable[[str], str]:
    """Import `package.module:function`, from a text to its language; raises ConfigError."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(f"language={name} cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"language={name} is not a function")
    return function


@dataclass(frozen=True)
class _Passed:
    """Sample that passed the filters."""

    member: int
    value: str  # of the field `filters.per_field`
    texts: list[Text]
    languages: list[int]  # language number of each text


@dataclass(frozen=True)
class TextMatcher:
    """Function that filters and matches the texts of a shard; pickled to the worker processes.

    Columns of the table: those of Matches; members [n] int32; same [T] int64, a hash of each text
    without case and spaces, if `filters.same_text` is set; values [n] int64, a hash of the field
    `filters.per_field`, if it is set; read [2], (samples, texts) of the shard; the tally of the
    steps; and the counts of languages without metadata.
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
        """Return the texts that pass all filters; only one if `texts=one`."""
        on_samples, on_texts = self._filters
        for name, keeps in on_samples.items():
            if not keeps(record):
                tally.take(name, record.member, len(captions))
                return []
        texts = [Text(number, caption) for number, caption in enumerate(captions)]
        for name, passes in on_texts.items():
            left = [text for text in texts if passes(record, text)]
            tally.narrow(name, record.member, texts, left)
            texts = left
        texts = [replace(text, language=self._language(record, text)) for text in texts]
        if allowed := self.config.filters.languages:
            left = [text for text in texts if text.language in allowed]
            tally.narrow("languages", record.member, texts, left)
            texts = left
        if self.config.texts == "one" and len(texts) > 1:
            tally.take(ONE_TEXT, record.member, len(texts) - 1, sample=False)
            texts = [self._draw_one(record, texts)]
        return texts

    def _draw_one(self, record: Record, texts: list[Text]) -> Text:
        """Draw a text by weight; the draw depends only on the seed and the sample."""
        shares = np.cumsum([text.caption.weight for text in texts])
        u = uniform(self.config.seed, self.source.identity(record.shard, record.member))
        return texts[min(int(np.searchsorted(shares, u * shares[-1], "right")), len(texts) - 1)]

    def _with_metadata(
        self, member: int, texts: list[Text], tally: Tally, unknown: Counter[str]
    ) -> list[tuple[Text, int]]:
        """Return (text, language number) of the texts whose language has metadata."""
        result = []
        for text in texts:
            language = self.metadata.language_of(text.language)
            if language < 0:
                unknown[text.language] += 1
                language = self.metadata.language_of(self.config.fallback)
            if language >= 0:
                result.append((text, language))
        tally.narrow(NO_METADATA, member, texts, result)
        return result

    def _language(self, record: Record, text: Text) -> str:
        """Determine the language of a text by the setting `language`."""
        if self._detect is not None:
            try:
                return str(self._detect(text.text) or "")
            except Exception as error:
                raise ConfigError(
                    f"language={self.config.language} fails for {text.text[:60]!r} "
                    f"({type(error).__name__}: {error}): make it return '' for an unknown language"
                ) from error
        if self.config.language == "language":
            return text.caption.language
        return str(record.meta.get(self.config.language) or "")

    def _value(self, record: Record) -> str:
        """Return the value of the field `filters.per_field` as text; "" if there is none."""
        field = self.config.filters.per_field
        value = record.meta.get(field) if field else None
        return "" if value is None else str(value)

    def _matched(self, shard: int, passed: list[_Passed], tally: Tally) -> Columns:
        """Match the texts, and return the columns of the samples with a match."""
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
        matched = np.diff(matches.entry_ends, prepend=0) > 0  # [T]
        left = matches.only(matched)
        for member, before, after in zip(members, matches.sizes, left.sizes, strict=True):
            tally.take(NO_MATCH, int(member), int(before - after), not after)
        nonempty = left.sizes > 0  # [n]
        columns = {name: getattr(left, name) for name in MATCHES}
        columns |= {"hashes": left.hashes[nonempty], "text_ends": left.text_ends[nonempty]}
        columns["members"] = members[nonempty]
        if self.config.filters.same_text:
            columns["same"] = hash_texts(plain(text.text) for text in texts)[matched]
        if self.config.filters.per_field:
            columns["values"] = hash_texts(row.value for row in passed)[nonempty]
        return columns

    def _find(self, texts: list[str], languages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the entries in texts of several languages: (entries [M] int32, ends [T] int64)."""
        order = np.argsort(languages, kind="stable")
        matches, counts = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for language in np.unique(languages).tolist():
            rows = order[languages[order] == language]
            entries, ends = self.metadata.find([texts[row] for row in rows], language)
            matches.append(entries)
            counts.append(np.diff(ends, prepend=0))
        entries, ends = np.concatenate(matches), np.cumsum(np.concatenate(counts))
        return take_rows(entries, ends, np.argsort(order))  # back to the original order

    @functools.cached_property
    def _filters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return sample_filters(self.config.filters), text_filters(self.config.filters)

    @functools.cached_property
    def _detect(self) -> Callable[[str], str] | None:
        name = self.config.language
        return language_function(name) if ":" in name else None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}


def unknown_languages(table: Mapping[str, np.ndarray]) -> Counter[str]:
    """Read the number of texts of a shard in each language without metadata."""
    names = unpack_texts(table["unknown"], table["unknown_ends"])
    return Counter(dict(zip(names, table["unknown_counts"].tolist(), strict=True)))


@dataclass(frozen=True)
class TextTables:
    """Matched texts of all shards, restricted to those that are left; left: None = no limit."""

    texts: Sidecar
    left: Sidecar | None = None

    @property
    def digest(self) -> str:
        """Digest of all tables."""
        return self.texts.digest + (self.left.digest if self.left is not None else "")

    def members(self, shard: int) -> np.ndarray:
        """Return the members of all samples in `matches`, including those without texts left."""
        return self.texts.table(shard)["members"]

    def matches(self, shard: int) -> Matches:
        """Return the matches of a shard."""
        table = self.texts.table(shard)
        matches = Matches(*(table[name] for name in MATCHES))
        return matches if self.left is None else matches.only(self.left.table(shard)["texts"] > 0)

    def __iter__(self) -> Iterator[Matches]:
        return map(self.matches, range(len(self.texts.counts)))


def sample_texts(pool: TextTables, rates: np.ndarray, seed: int, shard: int) -> Columns:
    """Draw the texts of a shard, as a table with one row per slot.

    Columns: members [k] int32; copies [k] int32, all 0; text_ends [k] int64, end of each slot in
    the next two; texts [K] int32, numbers of the kept captions in their sample; rows [K] int32,
    positions of the kept texts in the matches of the shard.
    """
    matches = pool.matches(shard)
    drawn = draw(matches, rates, seed)
    sizes = np.bincount(matches.sample_of[drawn], minlength=len(matches.hashes))
    members = pool.members(shard)[sizes > 0]
    return {
        "members": members,
        "copies": np.zeros(len(members), np.int32),
        "text_ends": np.cumsum(sizes[sizes > 0]),
        "texts": matches.texts[drawn],
        "rows": np.flatnonzero(drawn).astype(np.int32),
    }


class KeptSlots(CopySlots):
    """Slots of the samples that a curation keeps, with the texts that it keeps."""

    def texts(self, shard: int, slot: int) -> np.ndarray:
        """Return the numbers of the kept captions of a slot in its sample."""
        table = self.sidecar.table(shard)
        start = int(table["text_ends"][slot - 1]) if slot else 0
        return table["texts"][start : int(table["text_ends"][slot])]


def keep_listed(source: Source, config: SourceConfig, root: str = "", workers: int = 1) -> Source:
    """Restrict a source to the samples that its `keep` names; without one, return it unchanged.

    root: folder that the path of a list of uids is relative to. workers: processes that look for
    uids or captions. Raises ConfigError if its shards have no keep-list of that name, if the
    keep-list was made from other captions, for a list of uids that cannot be used, and for
    `captioned` if no sample has a caption.
    """
    if not config.keep:
        return source
    if config.keep == CAPTIONED:
        return keep_captioned(source, config.captions, workers)
    if is_uid_list(config.keep):
        return keep_uids(source, config.keep, root, workers)
    sidecar, key = open_sidecar(source, config.keep), f"data.sources.{source.name}"
    if sidecar is None or "captions" not in sidecar.facts:
        raise ConfigError(
            f"{key}.keep={config.keep}: its shards have no such keep-list; make it with xray data "
            f"curate, or use keep={CAPTIONED} for the samples that have captions"
        )
    if sidecar.facts["captions"] != config.captions:
        raise ConfigError(
            f"{key}.captions={config.captions}, but the texts of the keep-list {config.keep} were "
            f"chosen from captions={sidecar.facts['captions']}: set it to the same fields"
        )
    return source.with_slots(KeptSlots(sidecar))


def kept_sources(sources: Mapping[str, Source], data: DataConfig) -> dict[str, Source]:
    """Restrict the sources of a run to the samples that their `keep` names, as `keep_listed`."""
    return {
        name: keep_listed(source, data.sources[name], data.root, data.workers)
        for name, source in sources.items()
    }
