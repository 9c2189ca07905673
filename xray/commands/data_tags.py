"""`xray data tags`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from xray.commands.common import guarded, split_settings, takes
from xray.commands.data_common import DataAndSettings, Workers, open_any
from xray.progress import progress_of


@takes("data_pipelines.tags.reader:TagsConfig")
@guarded
def data_tags(
    items: DataAndSettings,
    out: Annotated[Path, typer.Option(help="Vocabulary to write")] = Path("vocabulary.json"),
    report: Annotated[
        Path | None, typer.Option(help="HTML page about it (default: beside it)")
    ] = None,
    workers: Workers = 2,
) -> None:
    """Build a vocabulary of tags."""
    from data_pipelines.tags.examples import find_examples
    from data_pipelines.tags.reader import TagsConfig
    from data_pipelines.tags.vocabulary import TagCounts, build_vocabulary, count_tags
    from xray.config.loading import build, parse_overrides
    from xray.reports.tags import SHOWN, dropped_table, summary, write_tag_report

    data, settings = split_settings(items)
    config = build(TagsConfig, parse_overrides(settings))
    config.validate("")
    counts, sources = TagCounts(), [open_any(pattern, "", "xray data tags") for pattern in data]
    for source in sources:
        own = count_tags(
            source, config.tags, config, workers, progress_of("reading"), config.captions
        )
        counts.join(own)
    facts = {"shards": data, **asdict(config)}
    vocabulary, dropped = build_vocabulary(counts, config, ", ".join(data), facts)
    out.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.save(out)
    page = report or out.with_suffix(".html")
    shown = {*vocabulary.tags[:SHOWN], *vocabulary.tags[-SHOWN:]}
    examples = find_examples(sources, vocabulary, config, shown)
    write_tag_report(vocabulary, counts, dropped, examples, page)
    dropped_table(vocabulary, counts, dropped).print()
    print(f"{summary(vocabulary, counts)}\n{out}, {page}")
