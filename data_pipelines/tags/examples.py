"""Example captions of tags, for the report on a vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.tags.reader import TagReader, TagsConfig
from data_pipelines.tags.vocabulary import Vocabulary
from data_pipelines.text.captions import captions_of
from data_pipelines.text.names import original_name
from xray.errors import BadSample
from xray.files import printable

EXAMPLES = 3  # samples per tag
MOST_READ = 100_000  # samples of a source that are searched for examples


def find_examples(
    sources: Sequence[Source], vocabulary: Vocabulary, config: TagsConfig, wanted: Collection[str]
) -> dict[str, list[str]]:
    """Return captions of some samples of each wanted tag; names for samples without a caption."""
    missing = set(wanted)
    examples: dict[str, list[str]] = {tag: [] for tag in wanted}
    reader = vocabulary.reader(config)
    for source in sources:
        for shard, member in itertools.islice(source.places(), MOST_READ):
            if not missing:
                return examples
            try:
                files = source.read(shard, member, TEXT_FILES)
                numbers = vocabulary.encode(reader.tags_of(files, config.tags, config.captions))
            except BadSample:
                continue
            for tag in missing & {vocabulary.tags[number] for number in numbers}:
                text = _caption_with(tag, files, vocabulary, reader, config)
                text = text or original_name(files) or printable(source.index(shard).key(member))
                examples[tag].append(text)
                if len(examples[tag]) == EXAMPLES:
                    missing.discard(tag)
    return examples


def _caption_with(
    tag: str, files: dict[str, bytes], vocabulary: Vocabulary, reader: TagReader, config: TagsConfig
) -> str:
    """Return the caption that has a tag, else the first caption, else ""."""
    try:
        captions = captions_of(files, config.captions)
    except BadSample:
        return ""
    if config.tags != "hashtags":
        number = vocabulary.ids[tag]
        for caption in captions:
            alone = reader.tags_of({"txt": caption.encode()}, config.tags, {"txt": 1.0})
            if number in vocabulary.encode(alone):
                return caption
    return captions[0]
