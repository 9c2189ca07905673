"""`xray data tags`, and what commands on shards share."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray.command import guarded
from xray.data_cli import Workers, data_app, progress_of
from xray.errors import ConfigError

if TYPE_CHECKING:
    from data_pipelines.sources import Source
    from data_pipelines.tags import TagReader, TagsConfig
    from data_pipelines.vocabulary import Vocabulary

Items = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS... [KEY=VALUE]...",
        help="Folders, globs, {000..123} patterns or URLs of .tar shards, and settings",
    ),
]
Modality = Annotated[str, typer.Option(help="image or video (default: what there is)")]
SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
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
    from data_pipelines.tags import TagsConfig
    from data_pipelines.vocabulary import TagCounts, build_vocabulary, count_tags
    from xray.config_files import build, parse_overrides
    from xray.tag_report import dropped_table, summary, write_tag_report

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


def split_items(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """(shards, settings); raises ConfigError where no shards are named."""
    settings = [item for item in items if SETTING.match(item)]
    shards = [item for item in items if item not in settings]
    if not shards:
        raise ConfigError("no shards are named")
    return shards, settings


def open_any(pattern: str, modality: str = "") -> Source:
    """The shards at a pattern as what they hold: pictures, else clips, else texts alone."""
    from data_pipelines.manifest import open_manifest, resolve
    from data_pipelines.sources import make_cache, open_source
    from xray.config import DataConfig

    if modality not in ("", "image", "video", "text"):
        raise ConfigError(f"--modality {modality}: use image, video or text")
    cache = make_cache(DataConfig())
    manifest = open_manifest(resolve(pattern), cache)
    held = [kind for kind in ("image", "video", "text") if manifest.counts(kind, "image").sum()]
    kind: Any = modality or (held or ["image"])[0]
    # what was compared with the tars a moment ago is not compared again
    return open_source(Path(pattern).name, pattern, kind, cache=cache, verify=False)


def find_examples(
    sources: Sequence[Source], vocabulary: Vocabulary, config: TagsConfig
) -> dict[str, list[str]]:
    """Captions, or keys, of some samples of each tag of the head and the tail."""
    from data_pipelines.captions import TEXT_FILES
    from data_pipelines.decode import BadSample
    from data_pipelines.utf8 import printable
    from xray.tag_report import SHOWN

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
    from data_pipelines.captions import captions_of
    from data_pipelines.decode import BadSample

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
