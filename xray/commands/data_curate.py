"""`xray data metadata`, `curate` and `tags`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from xray.commands.common import (
    DATA,
    SHARDS,
    Modality,
    Overrides,
    Workers,
    guarded,
    make_room,
    open_any,
    open_shards,
    settings,
    split_settings,
    takes,
)
from xray.files import write_in_place
from xray.progress import progress_of
from xray.words import count

FREQUENT = 8  # most frequent words that `metadata` prints


@takes("data_pipelines.curation.metadata:NgramConfig")
@guarded
def data_metadata(
    pool: Annotated[str, typer.Argument(metavar="DATA", help=f"{DATA}; a .txt of captions")],
    overrides: Overrides = None,
    lists: Annotated[
        list[Path] | None,
        typer.Option("--list", metavar="FILE", help="First entries, one per line"),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write")] = Path("metadata.txt"),
    modality: Modality = "",
    workers: Workers = 2,
) -> None:
    """Make the metadata that `curate` balances by: the given lists, then words and word pairs of
    the pool's captions."""
    from data_pipelines.curation.metadata import (
        NgramConfig,
        build_metadata,
        count_ngrams,
        read_metadata,
        write_metadata,
    )
    from data_pipelines.text.stop_words import stop_words

    make_room(out)
    config = settings(NgramConfig, overrides)
    stop_words(config.stop_words)  # a wrong name is found before the captions are counted
    given = [own for path in lists or [] for _, own in read_metadata(str(path)).lists]
    counts = count_ngrams(open_any(pool, modality, "xray data metadata"), workers=workers)
    metadata = build_metadata(given, counts, config)
    write_metadata(metadata, out)
    entries = count(len(metadata), "entry", "entries")
    print(f"{entries}, {sum(map(len, given)):,} of them given, in {out}")
    if not config.stop_words and (frequent := counts.entries(config)[:FREQUENT]):
        print(
            f"most frequent words: {', '.join(frequent)}; stop_words=[en] leaves out 'the' and such"
        )


@takes("data_pipelines.curation.config:CurationConfig")
@guarded
def data_curate(
    pool: Annotated[str, typer.Argument(metavar="SHARDS", help=SHARDS)],
    overrides: Overrides = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A .yaml file of settings")
    ] = None,
    report: Annotated[Path, typer.Option(help="HTML page to write")] = Path("curation.html"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write the kept samples as shards here")
    ] = None,
    modality: Modality = "",
) -> None:
    """Choose from a pool of captioned pictures or clips as MetaCLIP does: filters, duplicates, and
    balance over the entries of a metadata list.

    Writes a keep-list to .xray beside the shards, for data.sources.NAME.keep (docs/curation.md).
    """
    from data_pipelines.curation.config import CurationConfig
    from data_pipelines.curation.curate import check_folder, curate, write_shards
    from xray.config.loading import build, kinds_of, parse_overrides, read_yaml

    make_room(report, json_file)
    layers = [read_yaml(config_file)] if config_file is not None else []
    given = parse_overrides(overrides or [], kinds_of(CurationConfig))
    config = build(CurationConfig, *layers, given)
    source = open_shards(pool, modality, "xray data curate")
    if out is not None:
        check_folder(out, source)
    from xray.reports.curation import example_places, names_in, tables, write_curation_page

    curated = curate(source, config, progress_of("curating"))
    write_curation_page(curated.report, source, report)
    if json_file is not None:
        facts = json.dumps(asdict(curated.report), indent=1, ensure_ascii=False)
        write_in_place(json_file, facts)
    names = names_in(source, example_places(curated.report, source))
    for table in tables(curated.report, names):
        table.print()
    print(f"keep-list: {curated.kept.name} (data.sources.NAME.keep={curated.kept.name}); {report}")
    if out is not None:
        number = write_shards(curated, out, config.workers, progress_of("writing"))
        print(f"{count(number, 'sample')} in {out}")


@takes("data_pipelines.tags.reader:TagsConfig")
@guarded
def data_tags(
    items: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA... [KEY=VALUE]...", help=f"{DATA}; .txt files of captions; and settings"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Vocabulary to write")] = Path("vocabulary.json"),
    report: Annotated[
        Path | None, typer.Option(help="HTML page about it (default: beside it)")
    ] = None,
    workers: Workers = 2,
) -> None:
    """Build a vocabulary of tags."""
    from data_pipelines.tags.examples import find_examples
    from data_pipelines.tags.missing import TagKeys, why_no_tags
    from data_pipelines.tags.reader import TagsConfig
    from data_pipelines.tags.vocabulary import TagCounts, build_vocabulary, count_tags
    from xray.reports.tags import SHOWN, dropped_table, summary, write_tag_report

    data, given = split_settings(items)
    config = settings(TagsConfig, given)
    config.validate("")
    page = report or out.with_suffix(".html")
    make_room(out, page)
    counts, sources = TagCounts(), [open_any(pattern, "", "xray data tags") for pattern in data]
    for source in sources:
        reading = progress_of("reading")
        counts.join(count_tags(source, config.tags, config, workers, reading, config.captions))
    facts = {"shards": data, **asdict(config)}

    def why_none() -> str:
        rules = config.tags, config, config.captions, TagKeys()
        return "; ".join(why_no_tags(source, *rules) for source in sources)

    where = ", ".join(data)
    vocabulary, dropped = build_vocabulary(counts, config, where, facts, why_none=why_none)
    vocabulary.save(out)
    shown = {*vocabulary.tags[:SHOWN], *vocabulary.tags[-SHOWN:]}
    examples = find_examples(sources, vocabulary, config, shown)
    write_tag_report(vocabulary, counts, dropped, examples, page)
    dropped_table(vocabulary, counts, dropped).print()
    print(f"{summary(vocabulary, counts)}\n{out}, {page}")
