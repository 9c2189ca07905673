"""Filters of samples and texts, and a tally of the samples and texts that each filter drops.

A filter sees one sample at a time. Caps, which need the whole pool, work on compact hashes.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from data_pipelines.curation.config import FilterConfig
from data_pipelines.decode.images import open_image, upright_size
from data_pipelines.shards.columns import Columns, pack_texts, unpack_texts
from data_pipelines.shards.sidecar import Sidecar, open_sidecar
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES, media_extensions, media_in
from data_pipelines.tags.concept_matcher import words_of
from data_pipelines.text.captions import Caption, metadata_of
from xray.errors import BadSample, ConfigError

SHORTEST_REPEATING = 5  # words; in a shorter text, a repeated word means nothing
EXAMPLES = 5  # samples to name per step
# Steps after the filters that drop texts.
ONE_TEXT, NO_METADATA, NO_MATCH = "one text per sample", "no metadata", "no entry matches"
STEPS = (*(f.name for f in fields(FilterConfig)), ONE_TEXT, NO_METADATA, NO_MATCH)


@dataclass(frozen=True)
class Record:
    """Sample as input of the filters; its files are read only when a filter needs them."""

    source: Source
    shard: int
    member: int
    scored: Sidecar | None = None

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """Text files of the sample."""
        return self.source.read(self.shard, self.member, TEXT_FILES)

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """Content of the JSON file."""
        return metadata_of(self.files)

    @functools.cached_property
    def media(self) -> bytes:
        """Bytes of the image or clip."""
        return read_media(self.source, self.shard, self.member)

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) from the JSON, else from the image header; raises BadSample."""
        size = self.meta.get("width"), self.meta.get("height")
        if all(isinstance(side, int) and side > 0 for side in size):
            return size  # type: ignore[return-value]
        if self.source.modality == "video":
            raise BadSample("no size", "the JSON has no width and height")
        return upright_size(open_image(self.media))

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """Scores of the sample: one, one per text, or none."""
        assert self.scored is not None
        table = self.scored.table(self.shard)
        if "ends" in table:
            return self.scored.row(self.shard, self.member, "score")
        row = self.scored.find(self.shard, self.member)
        return np.empty(0, np.float32) if row is None else np.atleast_1d(table["score"][row])


@dataclass(frozen=True)
class Text:
    """Caption with its number in the sample, and its language once that was determined."""

    number: int
    caption: Caption
    language: str = ""

    @property
    def text(self) -> str:
        """Text of the caption."""
        return self.caption.text


def read_media(source: Source, shard: int, member: int) -> bytes:
    """Read only the image or clip of a sample; raises BadSample."""
    kind = source.modality, source.animations
    return media_in(source.read(shard, member, media_extensions(*kind)), *kind)


def open_scores(source: Source, name: str) -> Sidecar:
    """Open the sidecar of scores that `filters.scores` names; raises ConfigError."""
    sidecar, folder = open_sidecar(source, name), source.manifest.folder
    if sidecar is None:
        raise ConfigError(
            f"filters.scores={name}: {folder} has no such sidecar; make it with xray data scores"
        )
    if "score" not in sidecar.table(0):
        raise ConfigError(f"filters.scores={name}: the sidecar of {folder} has no column `score`")
    return sidecar


def sample_filters(config: FilterConfig) -> dict[str, Callable[[Record], bool]]:
    """Return the configured filters of samples, by config key; True keeps a sample."""
    c, filters = config, dict[str, Callable[[Record], bool]]()
    filters["min_width"] = lambda record: record.size[0] >= c.min_width
    filters["max_width"] = lambda record: record.size[0] <= c.max_width
    filters["min_height"] = lambda record: record.size[1] >= c.min_height
    filters["max_height"] = lambda record: record.size[1] <= c.max_height
    filters["min_aspect"] = lambda record: record.size[0] >= c.min_aspect * record.size[1]
    filters["max_aspect"] = lambda record: record.size[0] <= c.max_aspect * record.size[1]
    return {name: keeps for name, keeps in filters.items() if getattr(c, name)}


def text_filters(config: FilterConfig) -> dict[str, Callable[[Record, Text], bool]]:
    """Return the configured filters of texts, by config key; True keeps a text."""
    c, filters = config, dict[str, Callable[[Record, Text], bool]]()
    filters["min_words"] = lambda _, text: len(words_of(text.text)) >= c.min_words
    filters["max_words"] = lambda _, text: len(words_of(text.text)) <= c.max_words
    filters["min_chars"] = lambda _, text: len(text.text) >= c.min_chars
    filters["max_chars"] = lambda _, text: len(text.text) <= c.max_chars
    filters["max_word_share"] = lambda _, text: word_share(text.text) <= c.max_word_share
    filters["max_run"] = lambda _, text: not re.search(rf"(.)\1{{{c.max_run}}}", text.text)
    filters["scores"] = lambda record, text: score_of(record.scores, text.number) >= c.min_score
    return {name: keeps for name, keeps in filters.items() if getattr(c, name)}


def filters_on(config: FilterConfig) -> list[str]:
    """Return the config keys of all configured filters of samples and texts."""
    languages = ["languages"] if config.languages else []
    return [*sample_filters(config), *text_filters(config), *languages]


def word_share(text: str) -> float:
    """Return the share of the most frequent word in a text; 0 for texts of under 5 words."""
    words = words_of(text.casefold())
    if len(words) < SHORTEST_REPEATING:
        return 0.0
    return max(Counter(words).values()) / len(words)


def score_of(scores: np.ndarray, number: int) -> float:
    """Return the score of a text, which may be the score of its sample; -inf if there is none."""
    if len(scores) == 1:
        return float(scores[0])
    return float(scores[number]) if number < len(scores) else -math.inf


def place_of(step: str) -> int:
    """Return the order of a step in the report; causes of unreadable samples come first."""
    return STEPS.index(step) if step in STEPS else -1


def plain(text: str) -> str:
    """Normalise case and spaces of a text, to compare texts."""
    return " ".join(text.casefold().split())


def within_cap(groups: np.ndarray, order: np.ndarray, most: int) -> np.ndarray:
    """Mark the first `most` elements of each group, sorted by `order`: [n] bool."""
    rows = np.lexsort((order, groups))
    sorted_groups = groups[rows]
    starts = np.flatnonzero(np.diff(sorted_groups, prepend=sorted_groups[:1] - 1))
    sizes = np.diff(np.append(starts, len(rows)))
    kept = np.empty(len(groups), bool)
    kept[rows] = np.arange(len(rows)) - np.repeat(starts, sizes) < most
    return kept


@dataclass
class Taken:
    """Number of samples and texts that one step dropped, with examples."""

    samples: int = 0
    texts: int = 0  # including those of dropped samples
    members: list[int] = field(default_factory=list)  # of some samples, in their shard
    keys: list[str] = field(default_factory=list)  # of some samples


class Tally:
    """Counts of the samples and texts of a shard that each step dropped."""

    def __init__(self) -> None:
        self.steps: dict[str, Taken] = {}

    def take(self, step: str, member: int, texts: int, sample: bool = True) -> None:
        """Count dropped texts of a sample; sample: True if the sample is dropped with them."""
        if not texts and not sample:
            return
        taken = self.steps.setdefault(step, Taken())
        taken.texts += texts
        taken.samples += sample
        if sample and len(taken.members) < EXAMPLES:
            taken.members.append(member)

    def narrow(self, step: str, member: int, before: Sized, left: Sized) -> None:
        """Count the texts that a step dropped, and the sample if no text is left."""
        dropped = len(before) - len(left)
        self.take(step, member, dropped, sample=bool(before) and not left)

    def columns(self) -> Columns:
        """Convert the counts to columns of the table of a shard."""
        names, name_ends = pack_texts(self.steps)
        taken = list(self.steps.values())
        counts = [[t.samples, t.texts] for t in taken]
        members = [member for t in taken for member in t.members]
        return {
            "steps": names,
            "step_ends": name_ends,
            "step_counts": np.array(counts, np.int64).reshape(-1, 2),
            "step_members": np.array(members, np.int32),
            "step_member_ends": np.cumsum([len(t.members) for t in taken], dtype=np.int64),
        }


def read_tally(table: Mapping[str, np.ndarray]) -> dict[str, Taken]:
    """Read the counts per step from the table of a shard."""
    members = np.split(table["step_members"], table["step_member_ends"])
    names = unpack_texts(table["steps"], table["step_ends"])
    return {
        name: Taken(int(samples), int(texts), named.tolist())
        for name, (samples, texts), named in zip(names, table["step_counts"], members, strict=False)
    }
