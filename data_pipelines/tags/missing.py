"""Explains why samples have no tags: what they lack, how many of them, and which setting helps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.tags.reader import Origin, TagReader, TagRules, hashtags_in
from data_pipelines.text.captions import captions_of, metadata_of
from xray.errors import BadSample

MOST_READ = 10_000  # samples of a source
CLASS = "label_name"  # json field of the names of class folders


@dataclass(frozen=True)
class TagKeys:
    """Settings of a command for the origin of tags and for their json field."""

    tags: str = "tags"
    field: str = "field"


@dataclass
class Contents:
    """Numbers of samples that have what tags may be read from."""

    samples: int = 0
    captions: int = 0
    caption_hashtags: int = 0
    field: int = 0  # tags in the json field of hashtags
    classes: int = 0  # the name of a class folder

    @classmethod
    def of(cls, source: Source, rules: TagRules, captions: Mapping[str, float]) -> Contents:
        """Count over the first samples of a source."""
        found, reader = cls(), TagReader(rules.field, {})
        for place in itertools.islice(source.places(), MOST_READ):
            found.samples += 1
            try:
                files = source.read(*place, TEXT_FILES)
                facts = metadata_of(files)
                found.field += bool(reader.tags_of(files, "hashtags"))
                found.classes += isinstance(facts.get(CLASS), str)
                texts = captions_of(files, captions)  # raises for a sample without
            except BadSample:
                continue
            found.captions += 1
            found.caption_hashtags += any(hashtags_in(text) for text in texts)
        return found


def why_no_tags(
    source: Source,
    origin: Origin,
    rules: TagRules,
    captions: Mapping[str, float],
    keys: TagKeys,
    leave_out: str = "",
) -> str:
    """Say what the samples of a source lack to have tags, and each way out.

    leave_out: how the source, or the stage, can be left out; "" = it cannot.
    """
    held = Contents.of(source, rules, captions)
    every, way = f"none of the {held.samples:,} samples of {source.name}", ""
    if len(source) > held.samples:
        every = f"none of the first {held.samples:,} samples of {source.name}"
    if origin == "hashtags":
        what = f"{every} has tags in the json field {rules.field!r}" if not held.field else ""
    elif not held.captions:
        what = f"{every} has a caption, and {keys.tags}={origin} reads tags from captions"
        way = "pack them again with captions (a.txt beside a.jpg or a.mp4)"
    elif origin == "caption_hashtags" and not held.caption_hashtags:
        what = f"{every} has a #hashtag in its captions"
    else:
        what = ""
    what = what or f"{every} has a tag of the vocabulary"
    others = {
        "caption_words": held.captions,
        "caption_hashtags": held.caption_hashtags,
        "hashtags": held.field,
    }
    ways = [f"set {keys.tags}={name} ({n:,} have these)" for name, n in others.items() if n]
    ways = [own for own in ways if f"={origin} " not in own]
    if held.classes and not (origin == "hashtags" and rules.field == CLASS):
        number = f"({held.classes:,} are in class folders)"
        ways.append(f"set {keys.tags}=hashtags {keys.field}={CLASS} {number}")
    ways = [own for own in (way, *ways, leave_out) if own]
    return f"{what}: {', or '.join(ways)}" if ways else what
