"""`xray data tags`, and what commands on shards share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xray.commands.common import guarded
from xray.commands.data import Workers, data_app, progress_of
from xray.commands.data_common import Items, open_any, split_items

if TYPE_CHECKING:
    from data_pipelines.shards.source import Source
    from data_pipelines.tags.reader import TagReader, TagsConfig
    from data_pipelines.tags.vocabulary import Vocabulary

EXAMPLES, LETTERS = 3, 80  # samples shown of a tag, and letters of each
MOST_READ = 100_000  # samples of a source that are looked through for examples


@data_app.command("tags")
@guarded
def data_tags(
    items: Items,
    out: Annotated[Path, typer.Option(help="The vocabulary")] = Path("vocabulary.json"),
    report: Annotated[
        Path | None, typer.Option(help="A page about it (default: beside it)")
    ] = None,
    workers: Workers = 2,
) -> None:
    """Build a vocabulary of tags.

    Settings: tags=hashtags (json field; or caption_hashtags, caption_words, concepts)
    field=hashtags captions={} (their json fields) concepts=FILE aliases=FILE stop=FILE
    plurals=false min_count=5 max_size=100000.
    """
    from data_pipelines.tags.reader import TagsConfig
    from data_pipelines.tags.vocabulary import TagCounts, build_vocabulary, count_tags
    from xray.config.loading import build, parse_overrides
    from xray.reports.tags import dropped_table, summary, write_tag_report

    shards, settings = split_items(items)
    config = build(TagsConfig, parse_overrides(settings))
    config.validate("")
    counts, sources = TagCounts(), [open_any(pattern) for pattern in shards]
    for source in sources:
        found = count_tags(
            source, config.tags, config, workers, progress_of("reading"), config.captions
        )
        counts.join(found)
    facts = {"shards": shards, **asdict(config)}
    vocabulary, dropped = build_vocabulary(counts, config, ", ".join(shards), facts)
    out.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.save(out)
    page = report or out.with_suffix(".html")
    write_tag_report(vocabulary, counts, dropped, find_examples(sources, vocabulary, config), page)
    dropped_table(vocabulary, counts, dropped).print()
    print(f"{summary(vocabulary, counts)}\n{out}, {page}")


def find_examples(
    sources: Sequence[Source], vocabulary: Vocabulary, config: TagsConfig
) -> dict[str, list[str]]:
    """Captions, or keys, of some samples of each tag of the head and the tail."""
    from data_pipelines.shards.bad_sample import BadSample
    from data_pipelines.shards.tar_index import TEXT_FILES
    from data_pipelines.shards.utf8 import printable
    from xray.reports.tags import SHOWN

    wanted = {*vocabulary.tags[:SHOWN], *vocabulary.tags[-SHOWN:]}
    missing = set(wanted)
    found: dict[str, list[str]] = {tag: [] for tag in wanted}
    reader = vocabulary.reader(config)
    for source in sources:
        for shard, member in itertools.islice(source.places(), MOST_READ):
            if not missing:
                return found
            files = source.read(shard, member, TEXT_FILES)
            try:
                numbers = vocabulary.encode(reader.tags_of(files, config.tags, config.captions))
            except BadSample:
                continue
            for tag in missing & {vocabulary.tags[number] for number in numbers}:
                text = _caption_with(tag, files, vocabulary, reader, config)
                found[tag].append((text or printable(source.index(shard).key(member)))[:LETTERS])
                if len(found[tag]) == EXAMPLES:
                    missing.discard(tag)
    return found


def _caption_with(
    tag: str,
    files: dict[str, bytes],
    vocabulary: Vocabulary,
    reader: TagReader,
    config: TagsConfig,
) -> str:
    """A caption that a tag was found in, or any where it was found elsewhere; "" for none."""
    from data_pipelines.shards.bad_sample import BadSample
    from data_pipelines.text.captions import captions_of

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
