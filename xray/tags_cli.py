"""`xray data tags` and `xray data pseudo-tags`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray.command import guarded
from xray.data_cli import Workers, data_app, progress_bar, progress_of
from xray.errors import ConfigError

if TYPE_CHECKING:
    from data_pipelines.sources import Source
    from data_pipelines.tags import TagsConfig
    from data_pipelines.vocabulary import Vocabulary
    from xray.artifact import Artifact
    from xray.offline.pseudo_tags import Teacher

Items = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS... [KEY=VALUE]...",
        help="Folders, globs, {000..123} patterns or URLs of .tar shards, and settings",
    ),
]
SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
EXAMPLES, EXAMPLE_LENGTH = 3, 80  # samples shown of a tag, and letters of each
MOST_READ = 100_000  # samples of a source that are looked through for examples


@data_app.command("tags")
@guarded
def data_tags(
    items: Items,
    out: Annotated[Path, typer.Option(help="The vocabulary")] = Path("vocabulary.json"),
    report: Annotated[Path | None, typer.Option(help="A page about it [beside it]")] = None,
    workers: Workers = 2,
) -> None:
    """Build a vocabulary of tags.

    Settings: tags=hashtags (json field; or caption_hashtags, caption_words, concepts)
    field=hashtags concepts=FILE aliases=FILE stop=FILE plurals=false min_count=5 max_size=100000.
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
    dropped_table(vocabulary, dropped).print()
    print(f"{summary(vocabulary, counts)}\n{out}, {page}")


@data_app.command("pseudo-tags")
@guarded
def data_pseudo_tags(
    artifact: Annotated[str, typer.Argument(help="The teacher: a hashtag or a clip artifact")],
    items: Items,
    vocabulary: Annotated[
        Path | None, typer.Option(help="The tags that a clip artifact looks for")
    ] = None,
    modality: Annotated[str, typer.Option(help="image or video [what there is]")] = "",
) -> None:
    """Have a hashtag or clip artifact tag samples, and judge the tags they have.

    Writes a sidecar beside the shards, and prints its name for hashtag.teacher. The same command
    goes on where it was stopped. Settings: tags=hashtags field=hashtags (the samples' own tags)
    top=5 threshold=0.1 temperature=1.0 template='a photo of {}' (a clip artifact's) batch_size=64
    workers=2.
    """
    from xray.artifact import open_artifact
    from xray.config_files import build, parse_overrides
    from xray.offline.pseudo_tags import PseudoTagsConfig, write_pseudo_tags
    from xray.offline.stream import data_of

    shards, settings = split_items(items)
    config = build(PseudoTagsConfig, parse_overrides(settings))
    config.validate()
    teacher = open_artifact(artifact)
    tagger, tags = open_teacher(teacher, vocabulary, config.template)
    for pattern in shards:
        source = open_any(pattern, modality)
        with progress_bar("tagging") as progress:
            data = data_of(teacher, config.workers)
            found = write_pseudo_tags(source, tagger, tags, config, data, teacher.digest, progress)
        print(
            f"{pattern}: {found.added:,} of {found.untagged:,} untagged samples got tags, "
            f"{len(source):,} in all; hashtag.teacher={found.name}"
        )
        if found.causes:
            causes = ", ".join(f"{cause}: {n:,}" for cause, n in sorted(found.causes.items()))
            print(f"left out: {causes}")


def open_teacher(
    artifact: Artifact, vocabulary: Path | None, template: str
) -> tuple[Teacher, Vocabulary]:
    """An artifact as a teacher, and the tags it knows: its own, or a clip artifact's those given.

    Raises ConfigError where the artifact cannot tag, or whose tags are meant is not clear.
    """
    from data_pipelines.vocabulary import Vocabulary
    from xray import dist
    from xray.restore import Encoder, PromptTagger, Tagger

    device = dist.choose_device("auto")
    if artifact.stage == "hashtag":
        if vocabulary is not None:
            raise ConfigError(f"--vocabulary: {artifact.path} tags with its own vocabulary")
        return Tagger(artifact).to(device), Vocabulary.load(artifact.path / "vocabulary.json")
    if artifact.stage != "clip":
        raise ConfigError(
            f"{artifact.path} is of stage {artifact.stage}: a hashtag or clip artifact is needed"
        )
    if vocabulary is None:
        raise ConfigError("a clip artifact needs --vocabulary FILE, a json of xray data tags")
    tags = Vocabulary.load(vocabulary)
    return PromptTagger(Encoder(artifact).to(device), tags.tags, template), tags


def split_items(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """(shards, settings); raises ConfigError where no shards are named."""
    settings = [item for item in items if SETTING.match(item)]
    shards = [item for item in items if item not in settings]
    if not shards:
        raise ConfigError("no shards are named")
    return shards, settings


def open_any(pattern: str, modality: str = "") -> Source:
    """The shards at a pattern as what they hold, pictures or clips."""
    from data_pipelines.manifest import open_manifest, resolve
    from data_pipelines.sources import make_cache, open_source
    from xray.config import DataConfig

    if modality not in ("", "image", "video"):
        raise ConfigError(f"--modality {modality}: use image or video")
    cache = make_cache(DataConfig())
    manifest = open_manifest(resolve(pattern), cache)
    pictures = int(manifest.counts("image", "image").sum())
    kind: Any = modality or ("image" if pictures else "video")
    # what was compared with the tars a moment ago is not compared again
    return open_source(Path(pattern).name, pattern, kind, cache=cache, verify=False)


def find_examples(
    sources: Sequence[Source], vocabulary: Vocabulary, config: TagsConfig
) -> dict[str, list[str]]:
    """Captions, or keys, of some samples of each tag of the head and the tail."""
    from data_pipelines.captions import TEXT_FILES, captions_of
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
                text = captions_of(files, config.captions)[0]
            except BadSample as error:
                if error.cause != "no caption":
                    continue
                text = printable(source.index(shard).key(member))
            for tag in missing & {vocabulary.tags[number] for number in numbers}:
                found[tag].append(text[:EXAMPLE_LENGTH])
                if len(found[tag]) == EXAMPLES:
                    missing.discard(tag)
    return found
