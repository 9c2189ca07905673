"""`xray data metadata` and `xray data curate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from xray.commands.common import Overrides, guarded
from xray.commands.data import Workers, data_app, progress_of
from xray.commands.data_common import Modality, open_any

Pool = Annotated[
    str, typer.Argument(metavar="SHARDS", help="A folder, glob, {000..123} pattern or URL")
]


@data_app.command("metadata")
@guarded
def data_metadata(
    pool: Pool,
    overrides: Overrides = None,
    lists: Annotated[
        list[Path] | None, typer.Option("--list", help="Entries to begin with, one per line")
    ] = None,
    out: Annotated[Path, typer.Option(help="The metadata")] = Path("metadata.txt"),
    modality: Modality = "",
    workers: Workers = 2,
) -> None:
    """Make the metadata that `curate` balances by: lists you give, then the pool's own words and
    word pairs.

    Settings: min_count=100 min_pmi=10 (bits, of pairs) max_words=250000 max_pairs=100000.
    """
    from data_pipelines.curation.metadata import (
        NgramConfig,
        build_metadata,
        count_ngrams,
        read_metadata,
        write_metadata,
    )
    from xray.config.loading import build, parse_overrides

    config = build(NgramConfig, parse_overrides(overrides or []))
    given = [own for path in lists or [] for _, own in read_metadata(str(path)).lists]
    counts = count_ngrams(open_any(pool, modality), workers=workers)
    metadata = build_metadata(given, counts, config)
    write_metadata(metadata, out)
    print(f"{len(metadata):,} entries, {sum(map(len, given)):,} of them given, in {out}")


@data_app.command("curate")
@guarded
def data_curate(
    pool: Pool,
    overrides: Overrides = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A yaml with settings")
    ] = None,
    report: Annotated[Path, typer.Option(help="The page to write")] = Path("curation.html"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write what is kept as shards here")] = None,
    modality: Modality = "",
) -> None:
    """Choose from a pool of captioned pictures or clips as MetaCLIP does: filters, duplicates, and
    balance over the entries of a metadata list.

    Writes a keep-list beside the shards, for data.sources.NAME.keep. Settings: metadata=FILE|none
    t=20000 casefold=false texts=any|one reference= language=language fallback= seed=0
    engine=local|ray workers=2, filters.* and dedup.* (docs/curation.md).
    """
    from data_pipelines.curation.config import CurationConfig
    from data_pipelines.curation.curate import curate
    from data_pipelines.curation.write import check_folder, write_shards
    from xray.config.loading import build, parse_overrides, read_yaml
    from xray.reports.curation import tables, write_curation_page

    layers = [read_yaml(config_file)] if config_file is not None else []
    config = build(CurationConfig, *layers, parse_overrides(overrides or []))
    source = open_any(pool, modality)
    if out is not None:
        check_folder(out, source)
    found = curate(source, config, progress_of("curating"))
    write_curation_page(found.report, source, report)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(found.report), indent=1, ensure_ascii=False))
    for table in tables(found.report):
        table.print()
    print(f"keep-list: {found.kept.name} (data.sources.NAME.keep={found.kept.name}); {report}")
    if out is not None:
        number = write_shards(found, out, config.workers, progress_of("writing"))
        print(f"{number:,} samples in {out}")
