"""`xray data ...`: make, index, check and look at data."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xray.commands.common import Overrides, guarded
from xray.progress import progress_bar, progress_of

if TYPE_CHECKING:
    from data_pipelines.checks.check import CheckReport

data_app = typer.Typer(help="Make and inspect data.", no_args_is_help=True)
Shards = Annotated[
    list[str], typer.Argument(help="Folders, globs, {000..123} patterns or URLs of .tar shards")
]
LISTED = 20  # bad samples that `check` prints
Workers = Annotated[int, typer.Option(min=1, help="Processes")]
Cache = Annotated[str, typer.Option(help="Folder for remote shards (default: the user's cache)")]


@data_app.command("demo")
@guarded
def data_demo(
    folder: Annotated[Path, typer.Argument(help="Where to write it")],
    overrides: Overrides = None,
) -> None:
    """Generate pictures and clips of coloured shapes, with captions and hashtags, as shards."""
    from data_pipelines.ingest.demo import DemoConfig, make_demo
    from xray.config.loading import build, parse_overrides

    make_demo(folder, build(DemoConfig, parse_overrides(overrides or [])))
    print(f"demo data in {folder}")


@data_app.command("index")
@guarded
def data_index(
    shards: Shards,
    checksum: Annotated[bool, typer.Option(help="Also take the sha256 of every tar")] = False,
    workers: Workers = 2,
    cache: Cache = "",
) -> None:
    """Index shards and write their manifest, so that the first run need not."""
    from data_pipelines.shards.manifest import write_manifest
    from data_pipelines.shards.source import make_cache
    from data_pipelines.shards.tar_index import Modality
    from xray.config import DataConfig

    kept = make_cache(DataConfig(cache=cache))
    for pattern in shards:
        manifest = write_manifest(pattern, kept, checksum, workers, progress_of("indexing"))
        kinds: tuple[Modality, ...] = ("image", "video", "text")
        images, clips, texts = (int(manifest.counts(kind, "image").sum()) for kind in kinds)
        print(
            f"{pattern}: {len(manifest):,} shards, {images:,} images, {clips:,} clips, "
            f"{texts:,} samples with text, digest {manifest.digest[:12]}"
        )


@data_app.command("pack")
@guarded
def data_pack(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A folder or a list of files")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the shards go")],
    overrides: Overrides = None,
) -> None:
    """Turn your own pictures and clips into shards: a folder with .txt/.json beside the media, a
    HF imagefolder, or a .csv, .tsv, .jsonl or .parquet list of files.

    Settings: per_shard=1000 short_side=0 (shrink to) quality=92 gop=0 (key-frame distance of
    re-encoded clips) crf=20 workers=2. The same command goes on where it was stopped.
    """
    from data_pipelines.ingest.pack import PackConfig, pack
    from data_pipelines.shards.manifest import write_manifest
    from xray.config.loading import build, parse_overrides

    config = build(PackConfig, parse_overrides(overrides or []))
    with progress_bar("packing") as progress:
        report = pack(source, out, config, progress)
    write_manifest(str(out), checksum=True, workers=config.workers)
    print(f"{out}: {report.samples:,} samples in {report.shards:,} shards", end="")
    print(f", {report.reused:,} of them already there" if report.reused else "", end="")
    print(f", of {report.classes:,} classes by their folders' names" if report.classes else "")
    if report.outside:
        files = f"{report.outside[0]} and {len(report.outside) - 1:,} more files"
        print(
            f"no label: {files if report.outside[1:] else report.outside[0]}, in no class's folder"
        )
    if report.skipped:
        causes = ", ".join(f"{cause}: {n:,}" for cause, n in sorted(report.skipped.items()))
        print(f"left out: {causes}; listed in {out / 'pack_skipped.jsonl'}")


@data_app.command("check")
@guarded
def data_check(
    shards: Shards,
    workers: Workers = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write what was found to this file")
    ] = None,
    cache: Cache = "",
) -> None:
    """Decode every sample and compare every tar with its index; exit code 1 where one is broken."""
    from xray.reports.shards import check_table, findings, summary, totals

    report = _checked(shards, workers, cache)
    if json_file is not None:
        json_file.write_text(json.dumps(summary(report), indent=1) + "\n")
    check_table(report).print()
    print(totals(report))
    for line in findings(report, LISTED):
        print(line)
    if report.broken:
        raise SystemExit(1)


@data_app.command("stats")
@guarded
def data_stats(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="The page to write")] = Path("stats.html"),
    workers: Workers = 2,
    cache: Cache = "",
) -> None:
    """Draw sizes, lengths, tags, languages and a sheet of samples into one HTML page."""
    from xray.reports.shards import totals, write_stats

    report = _checked(shards, workers, cache)
    write_stats(report, out)
    print(totals(report))
    print(f"statistics in {out}")


def _checked(shards: list[str], workers: int, cache: str) -> CheckReport:
    """All patterns read, as one report."""
    from data_pipelines.checks.check import CheckReport, check
    from data_pipelines.shards.source import make_cache
    from xray.config import DataConfig

    config = DataConfig(cache=cache)
    kept = make_cache(config)

    def read(pattern: str) -> CheckReport:
        with progress_bar("reading") as progress:
            return check(pattern, kept, config, workers, progress)

    return functools.reduce(CheckReport.joined, map(read, shards))


@data_app.command("tiny-llm")
@guarded
def data_tiny_llm(
    folder: Annotated[str, typer.Argument(help="Where to write it")],
    captions: Annotated[str, typer.Option(help="Shards whose captions train the tokenizer")],
    overrides: Overrides = None,
) -> None:
    """Make a small random LLM and a tokenizer, for machines without a pretrained one."""
    from xray.config.loading import build, parse_overrides
    from xray.config.prepare import LlmConfig
    from xray.recipes.prepare import make_llm

    given = {**parse_overrides(overrides or []), "path": folder, "captions": captions}
    make_llm(build(LlmConfig, given), "")
    print(f"LLM in {folder}")
