"""Tags of a sample and the vocabulary of a set of shards.

Canonical form: NFKC, casefold, without the leading '#'. A source's tags come from the json field
`hashtags`, or (`tags: caption_words`) from the words of its captions.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.captions import TEXT_FILES, captions_of, metadata_of
from data_pipelines.decode import BadSample
from data_pipelines.sources import Source
from xray.config import hash_json
from xray.errors import ArtifactError, DataError

# English words that say nothing a picture could show; caption words only.
_STOP = """
a about above across after against all along also among an and another any are around as at away
back be been before behind being below beside between both but by can close coming down during each
few five for four from front get gets getting go goes going had has have having he her herself him
himself his in inside into is it its itself just large left like little look looking looks made make
makes making many more most near new next no not of off on one onto or other out outside over own
part past right set several she side small some something stand standing stands such take taken
takes taking that the their them there these they this those three through to together top towards
toward two under up using very was way wearing wears what when where which while who with within
without area big
"""
STOP_WORDS = frozenset(_STOP.split())
WORD = re.compile(r"[^\W\d_]+", re.UNICODE)


def canonical(tag: str) -> str:
    """One spelling per tag."""
    return unicodedata.normalize("NFKC", tag).strip().lstrip("#").casefold()


def tags_of(files: dict[str, bytes], origin: str) -> list[str]:
    """The sample's tags in order of appearance, each once."""
    if origin == "hashtags":
        found = metadata_of(files).get("hashtags") or []
        found = found.split() if isinstance(found, str) else found
        if not isinstance(found, list):
            raise BadSample("broken hashtags", f"{type(found).__name__}, not a list")
        tags = [canonical(str(tag)) for tag in found]
    else:
        words = [word for caption in captions_of(files) for word in WORD.findall(caption)]
        tags = [tag for tag in map(canonical, words) if len(tag) > 2 and tag not in STOP_WORDS]
    return [tag for tag in dict.fromkeys(tags) if tag]


@dataclass(frozen=True)
class Vocabulary:
    """Tags by descending count; a tag's id is its place."""

    tags: tuple[str, ...]
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tags)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {tag: i for i, tag in enumerate(self.tags)}

    @property
    def digest(self) -> str:
        return hash_json(list(self.tags))

    def encode(self, tags: list[str]) -> list[int]:
        """Ids of the tags that are in the vocabulary."""
        return [self.ids[tag] for tag in tags if tag in self.ids]

    def save(self, path: Path) -> None:
        rows = [
            {"id": i, "name": tag, "count": count}
            for i, (tag, count) in enumerate(zip(self.tags, self.counts, strict=True))
        ]
        path.write_text(json.dumps({"tags": rows, "sha256": self.digest}, indent=1))

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a vocabulary; raises ArtifactError when it is missing or changed."""
        try:
            content = json.loads(path.read_text())
            rows = content["tags"]
            result = cls(tuple(r["name"] for r in rows), tuple(r["count"] for r in rows))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is not a vocabulary: {error}") from error
        if result.digest != content.get("sha256"):
            raise ArtifactError(f"{path} was changed: its tags do not match its sha256")
        return result


def read_tags(source: Source, origin: str) -> list[list[list[str]]]:
    """Tags of every slot of a source, by shard; a sample that has none counts as untagged."""
    result = []
    for shard in range(len(source.manifest)):
        rows = []
        for member in source.members(shard).tolist():
            try:
                rows.append(tags_of(source.read(shard, member, TEXT_FILES), origin))
            except BadSample:
                rows.append([])
        result.append(rows)
    return result


def build_vocabulary(
    tags: Mapping[str, list[list[list[str]]]], min_count: int, max_size: int
) -> Vocabulary:
    """The most frequent tags of all sources; raises DataError when none is frequent enough."""
    counts = Counter(t for shards in tags.values() for rows in shards for row in rows for t in row)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_size]
    kept = [(tag, count) for tag, count in ranked if count >= min_count]
    if not kept:
        raise DataError(
            f"no tag occurs {min_count} times in {', '.join(tags)}: lower hashtag.min_count, or "
            "set data.sources.NAME.tags to hashtags or caption_words"
        )
    return Vocabulary(tuple(t for t, _ in kept), tuple(c for _, c in kept))


def keep_tagged(source: Source, tags: list[list[list[str]]], vocabulary: Vocabulary) -> Source:
    """The source without the samples that have no tag of the vocabulary."""
    slots = []
    for shard, rows in enumerate(tags):
        tagged = np.array([bool(vocabulary.encode(row)) for row in rows], bool)
        slots.append(source.members(shard)[tagged])
    kept = source.with_slots(slots)
    if not len(kept):
        raise DataError(f"source {source.name!r} has no sample with a tag of the vocabulary")
    return kept
