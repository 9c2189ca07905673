"""`xray data metadata` and `xray data curate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from xray.commands.common import Overrides, guarded, takes
from xray.commands.data_common import DATA, SHARDS, Modality, Workers, open_any, open_shards
from xray.progress import progress_of


@takes("data_pipelines.curation.metadata:NgramConfig")
@guarded
def data_metadata(
    pool: Annotated[str, typer.Argument(metavar="DATA", help=f"{DATA}; a .txt of captions")],
    overrides: Overrides = None,
    lists: Annotated[
        list[Path] | None, typer.Option("--list", help="First entries, one per line")
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
    from xray.config.loading import build, parse_overrides

    config = build(NgramConfig, parse_overrides(overrides or []))
    given = [own for path in lists or [] for _, own in read_metadata(str(path)).lists]
    counts = count_ngrams(open_any(pool, modality, "xray data metadata"), workers=workers)
    metadata = build_metadata(given, counts, config)
    write_metadata(metadata, out)
    print(f"{len(metadata):,} entries, {sum(map(len, given)):,} of them given, in {out}")


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

    Writes a keep-list beside the shards, for data.sources.NAME.keep (docs/curation.md).
    """
    from data_pipelines.curation.config import CurationConfig
    from data_pipelines.curation.curate import check_folder, curate, write_shards
    from xray.config.loading import build, parse_overrides, read_yaml
    from xray.reports.curation import tables, write_curation_page

    layers = [read_yaml(config_file)] if config_file is not None else []
    config = build(CurationConfig, *layers, parse_overrides(overrides or []))
    source = open_shards(pool, modality, "xray data curate")
    if out is not None:
        check_folder(out, source)
    curated = curate(source, config, progress_of("curating"))
    write_curation_page(curated.report, source, report)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(curated.report), indent=1, ensure_ascii=False))
    for table in tables(curated.report):
        table.print()
    print(f"keep-list: {curated.kept.name} (data.sources.NAME.keep={curated.kept.name}); {report}")
    if out is not None:
        number = write_shards(curated, out, config.workers, progress_of("writing"))
        print(f"{number:,} samples in {out}")
