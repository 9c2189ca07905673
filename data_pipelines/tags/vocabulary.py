"""Vocabulary of a tag head: its tags, their counts and aliases, built from counted samples."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.columns import (
    Columns,
    open_first,
    pack_texts,
    save_columns,
    unpack_texts,
)
from data_pipelines.shards.process_pool import Progress, over_shards
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.tags.reader import (
    Origin,
    TagReader,
    TagRules,
    aliases_in,
    canonical,
    read_list,
    singulars,
    stop_list,
)
from xray.config.identity import hash_json
from xray.errors import ArtifactError, BadSample, ConfigError, DataError
from xray.files import write_in_place
from xray.records import parse_record

EXAMPLES = 1000  # dropped tags to remember by name, per reason


@dataclass
class _Row:
    id: int
    name: str
    count: int
    aliases: list[str] = field(default_factory=list)


@dataclass
class _Content:
    tags: list[_Row]
    sha256: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Vocabulary:
    """Tags by descending count; the id of a tag is its position."""

    tags: tuple[str, ...]
    counts: tuple[int, ...]  # samples with each tag
    aliases: tuple[tuple[str, ...], ...] = ()  # other spellings of each tag
    settings: Mapping[str, Any] = field(default_factory=dict)  # that it was built with

    def __len__(self) -> int:
        return len(self.tags)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Spelling -> id, for all tags and aliases."""
        ids = {alias: i for i, names in enumerate(self.aliases) for alias in names}
        return ids | {tag: i for i, tag in enumerate(self.tags)}

    @property
    def digest(self) -> str:
        """Digest of the tags and aliases; counts and settings do not change it."""
        return hash_json([list(self.tags), [list(names) for names in self.aliases]])

    def encode(self, tags: Iterable[str]) -> list[int]:
        """Return the ids of those tags that are in the vocabulary, each once."""
        ids = (self.ids.get(tag) for tag in tags)
        return list(dict.fromkeys(number for number in ids if number is not None))

    def reader(self, rules: TagRules) -> TagReader:
        """Return a reader of tags whose concepts are the spellings of this vocabulary."""
        return TagReader(rules.field, {}, self.ids)

    def save(self, path: Path) -> None:
        """Write the vocabulary to a JSON file."""
        columns = zip(self.tags, self.counts, self.aliases or [()] * len(self), strict=True)
        rows = [_Row(i, tag, count, list(names)) for i, (tag, count, names) in enumerate(columns)]
        content = _Content(rows, self.digest, dict(self.settings))
        write_in_place(path, json.dumps(asdict(content), indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a vocabulary; raises ArtifactError if it is missing, empty or was edited."""
        try:
            content = parse_record(path.read_text("utf-8"), _Content)
            aliases = tuple(tuple(row.aliases) for row in content.tags)
            result = cls(
                tuple(row.name for row in content.tags),
                tuple(row.count for row in content.tags),
                aliases if any(aliases) else (),
                content.settings,
            )
        except FileNotFoundError as error:
            raise ArtifactError(f"the vocabulary {path} does not exist") from error
        except UnicodeDecodeError as error:
            raise ArtifactError(
                f"{path} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv -t UTF-8"
            ) from error
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{path} is not a vocabulary ({error}): make one with xray data tags"
            ) from error
        if not content.tags:
            raise ArtifactError(f"the vocabulary {path} is empty")
        if result.digest != content.sha256:
            raise ArtifactError(
                f"{path} was changed: its tags do not match its sha256; make it again with xray "
                "data tags"
            )
        return result


@dataclass
class TagCounts:
    """Counts of samples per tag, and per pair of a plural and its singular."""

    samples: int = 0
    tagged: int = 0  # with at least one tag
    tags: Counter[str] = field(default_factory=Counter)
    both: Counter[tuple[str, str]] = field(default_factory=Counter)  # with both (plural, singular)

    def add(self, tags: Sequence[str]) -> None:
        """Count a sample with these tags."""
        self.samples += 1
        self.tagged += bool(tags)
        self.tags.update(tags)
        unique = set(tags)
        self.both.update((tag, one) for tag in tags for one in singulars(tag) if one in unique)

    def join(self, other: TagCounts) -> None:
        """Add other counts, in place."""
        self.samples += other.samples
        self.tagged += other.tagged
        self.tags.update(other.tags)
        self.both.update(other.both)

    def columns(self) -> Columns:
        """Convert the counts to columns of a file."""
        tags, tag_ends = pack_texts(self.tags)
        pairs, pair_ends = pack_texts(tag for pair in self.both for tag in pair)
        return {
            "sizes": np.array([self.samples, self.tagged], np.int64),
            "tags": tags,
            "tag_ends": tag_ends,
            "counts": np.array([*self.tags.values()], np.int64),
            "pairs": pairs,
            "pair_ends": pair_ends,
            "pair_counts": np.array([*self.both.values()], np.int64),
        }

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray]) -> TagCounts:
        """Make counts from the columns of a file."""
        samples, tagged = columns["sizes"].tolist()
        tags = unpack_texts(columns["tags"], columns["tag_ends"])
        names = iter(unpack_texts(columns["pairs"], columns["pair_ends"]))
        pairs = list(zip(names, names, strict=True))
        return cls(
            samples,
            tagged,
            Counter(dict(zip(tags, columns["counts"].tolist(), strict=True))),
            Counter(dict(zip(pairs, columns["pair_counts"].tolist(), strict=True))),
        )


@functools.lru_cache(maxsize=4)
def raw_reader(field: str, aliases: str, concepts: str) -> TagReader:
    """Make a reader from files of aliases and concepts; raises ConfigError for mistakes."""
    tag_of = aliases_in(read_list(aliases, "aliases"), "aliases") if aliases else {}
    if not concepts:
        return TagReader(field, tag_of)
    rows = read_list(concepts, "concepts")
    names = {canonical(name) for row in rows for name in row}
    return TagReader(field, aliases_in(rows, "concepts") | tag_of, names)


def count_tags(
    source: Source,
    origin: Origin,
    rules: TagRules,
    workers: int = 1,
    progress: Progress | None = None,
    captions: Mapping[str, float] | None = None,
) -> TagCounts:
    """Count the tags of all samples of a source; counts are saved beside the shard indexes.

    captions: JSON field -> weight for tags from captions (`read_captions`). Raises ConfigError.
    """
    if origin == "concepts" and not rules.concepts:
        raise ConfigError("concepts is not set: tags=concepts needs a file of one concept per line")
    reader, captions = raw_reader(rules.field, rules.aliases, rules.concepts), dict(captions or {})
    facts = {"source": source.digest, "tags": origin, "captions": captions, **reader.facts}
    name = f"tags-{hash_json(facts)[:12]}"
    saved, _ = open_first(source.derived_at(name), facts)
    if saved:
        return TagCounts.of(saved)
    counts, work = TagCounts(), functools.partial(_count_shard, source, origin, rules, captions)
    for of_shard in over_shards(work, len(source.manifest), workers, progress):
        counts.join(of_shard)
    save_columns(source.derived(name), counts.columns(), facts)
    return counts


def _count_shard(
    source: Source, origin: Origin, rules: TagRules, captions: Mapping[str, float], shard: int
) -> TagCounts:
    reader, counts = raw_reader(rules.field, rules.aliases, rules.concepts), TagCounts()
    for member in source.members(shard).tolist():
        try:
            tags = reader.tags_of(source.read(shard, member, TEXT_FILES), origin, captions)
        except BadSample:
            tags = []
        counts.add(tags)
    return counts


@dataclass
class Dropped:
    """Tags left out of a vocabulary for one reason."""

    tags: int = 0  # their number
    samples: int = 0  # sum of their counts
    first: list[tuple[str, int]] = field(default_factory=list)  # the most frequent, with counts

    def add(self, tag: str, count: int) -> None:
        """Add a tag with its count."""
        self.tags += 1
        self.samples += count
        if len(self.first) < EXAMPLES:
            self.first.append((tag, count))


def build_vocabulary(
    counts: TagCounts,
    rules: TagRules,
    where: str,
    settings: Mapping[str, Any] | None = None,
    section: str = "",
    why_none: Callable[[], str] = str,
) -> tuple[Vocabulary, dict[str, Dropped]]:
    """Build a vocabulary of the most frequent tags; also return the left-out tags by reason.

    where: names of the sources; section: prefix of the rules' keys; why_none: explains that no
    sample has a tag; all for the error. Raises DataError if no tag is frequent enough.
    """
    merged, plurals = _merge_plurals(counts) if rules.plurals else (counts.tags, {})
    spellings: dict[str, list[str]] = {}
    files = [(rules.aliases, "aliases"), (rules.concepts, "concepts")]
    listed = [aliases_in(read_list(path, key), key) for path, key in files if path]
    for alias, tag in chain.from_iterable(tag_of.items() for tag_of in [*listed, plurals]):
        spellings.setdefault(plurals.get(tag, tag), []).append(alias)
    stop = stop_list(rules.stop)
    dropped: dict[str, Dropped] = {}
    kept: list[tuple[str, int]] = []
    for tag, count in sorted(merged.items(), key=lambda item: (-item[1], item[0])):
        reason = ""
        if tag in stop:
            reason = "in the stop list"
        elif count < rules.min_count:
            reason = f"in fewer than {rules.min_count} samples"
        elif len(kept) >= rules.max_size:
            reason = f"beyond the {rules.max_size:,} most frequent"
        if reason:
            dropped.setdefault(reason, Dropped()).add(tag, count)
        else:
            kept.append((tag, count))
    if not kept:
        best = max((count for tag, count in merged.items() if tag not in stop), default=0)
        way = f"set {section}min_count={best}" if best else f"set {section}stop=none"
        raise DataError(
            f"no tag occurs in {rules.min_count} samples of {where} ({counts.tagged:,} of "
            f"{counts.samples:,} have a tag): {way if counts.tagged else why_none()}"
        )
    tags, numbers = zip(*kept, strict=True)
    aliases = tuple(tuple(sorted(set(spellings.get(tag, ())))) for tag in tags)
    facts = {"samples": counts.samples, "tagged": counts.tagged, **(settings or {})}
    vocabulary = Vocabulary(tags, numbers, aliases if any(aliases) else (), facts)
    return vocabulary, dropped


def _merge_plurals(counts: TagCounts) -> tuple[Counter[str], dict[str, str]]:
    """Return (counts with plurals merged into their singulars, plural -> singular)."""
    merged, plurals = Counter(counts.tags), {}
    for tag in counts.tags:
        one = max(singulars(tag), key=lambda s: (counts.tags.get(s, 0), s), default="")
        if counts.tags.get(one, 0) > 0:
            plurals[tag] = one
    for tag in sorted(plurals, key=len, reverse=True):
        one = plurals[tag]
        merged[one] += merged.pop(tag) - counts.both[(tag, one)]
    return merged, {tag: plurals.get(one, one) for tag, one in plurals.items()}
