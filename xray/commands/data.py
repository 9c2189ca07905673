"""`xray data demo`, `index`, `pack`, `split`, `check`, `stats`, `clean` and `tiny-llm`."""

from __future__ import annotations

import functools
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xray.commands.common import (
    DATA,
    SHARDS,
    Overrides,
    Workers,
    check_folder,
    guarded,
    make_room,
    settings,
    takes,
)
from xray.commands.help import examples
from xray.files import write_in_place
from xray.progress import progress_bar, progress_of
from xray.words import count, counted

if TYPE_CHECKING:
    from data_pipelines.checks.check import CheckReport
    from data_pipelines.ingest.pack import PackReport

LISTED = 20  # bad samples that `check` prints
Data = Annotated[list[str], typer.Argument(metavar="DATA...", help=DATA)]
Cache = Annotated[str, typer.Option(help="Folder for remote shards (default: the user's cache)")]


@takes("data_pipelines.ingest.demo:DemoConfig")
@guarded
def data_demo(
    folder: Annotated[Path, typer.Argument(help="Folder to write")], overrides: Overrides = None
) -> None:
    """Generate pictures and clips of coloured shapes, with captions and hashtags, as shards."""
    from data_pipelines.ingest.demo import DemoConfig, make_demo

    check_folder(folder)
    make_demo(folder, settings(DemoConfig, overrides))
    print(f"demo data in {folder}")


@guarded
def data_index(
    shards: Annotated[list[str], typer.Argument(help=SHARDS)],
    checksum: Annotated[bool, typer.Option(help="Also compute the sha256 of every tar")] = False,
    workers: Workers = 2,
    cache: Cache = "",
) -> None:
    """Index shards and write their manifest ahead of the first run."""
    from data_pipelines.ingest.user_data import kind_of
    from data_pipelines.shards.manifest import resolve, write_manifest
    from data_pipelines.shards.source import make_cache
    from data_pipelines.shards.tar_index import Modality
    from xray.config import DataConfig

    kept = make_cache(DataConfig(cache=cache))
    for pattern in map(resolve, shards):
        kind_of(pattern, ("shards",), "xray data index")
        manifest = write_manifest(pattern, kept, checksum, workers, progress_of("indexing"))
        kinds: tuple[Modality, ...] = ("image", "video", "text")
        images, clips, texts = (manifest.counts(kind, "image").sum() for kind in kinds)
        media = f"{count(images, 'image')}, {count(clips, 'clip')}"
        print(
            f"{pattern}: {count(len(manifest), 'shard')}, {media}, "
            f"{count(texts, 'sample')} with text, digest {manifest.digest[:12]}"
        )


@examples(
    ("xray data pack photos /data/mine/images short_side=256", "pictures, shrunk to 256 pixels"),
    (
        "xray data pack clips /data/mine/clips short_side=256 gop=16 per_shard=200",
        "clips, re-encoded with a key frame every 16 frames, which makes seeking fast",
    ),
    ("xray data pack photos.csv /data/mine/images", "the files and captions of a list"),
)
@takes("data_pipelines.ingest.pack:PackConfig")
@guarded
def data_pack(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A folder or a list of files")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards")],
    overrides: Overrides = None,
) -> None:
    """Pack pictures and clips into shards: a folder with .txt and .json files beside the media,
    class folders, a Hugging Face imagefolder, a .csv, .tsv, .jsonl, .json or .parquet list of
    files, or a caption file of Flickr8k, Flickr30k, COCO or Karpathy.

    After an interruption, run the same command again: it continues.
    """
    from data_pipelines.ingest.endings import by_ending
    from data_pipelines.ingest.held_out import VAL, held_out_line
    from data_pipelines.ingest.pack import PackConfig, captioned, pack
    from data_pipelines.shards.manifest import write_manifest

    check_folder(out)
    config = settings(PackConfig, overrides)
    with progress_bar("packing") as progress:
        report = pack(source, out, config, progress)
    for folder in [out] + [out / VAL] * bool(report.held_out):
        write_manifest(str(folder), checksum=True, workers=config.workers)
    print(f"{out}: {count(report.samples, 'sample')} in {count(report.shards, 'shard')}", end="")
    print(f", {report.reused:,} of them already there" if report.reused else "", end="")
    classes = count(report.classes, "class", "classes")
    print(f", of {classes} by their folders' names" if report.classes else "")
    if config.val:
        print(held_out_line(out / VAL, report.held_out, report.cut))
    told, samples = captioned(out), report.samples + report.held_out
    print(f"captions: {told:,} of {samples:,} samples have captions", end="")
    print("" if told else f"; {_captions_elsewhere(source, out, report)}")
    if report.empty:
        print(f"empty captions: {count(report.empty, 'row')} of the table")
    if report.unread:
        print(f"not read: {by_ending(report.unread)}")
    if report.outside:
        first, *others = report.outside
        more = f" and {len(others):,} more files" if others else ""
        print(f"no label: {first}{more}, in no class's folder")
    if report.skipped:
        print(f"left out: {counted(report.skipped)}; listed in {out / 'pack_skipped.jsonl'}")


@takes("data_pipelines.ingest.split:SplitConfig")
@guarded
def data_split(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help=SHARDS)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the new shards")],
    overrides: Overrides = None,
) -> None:
    """Copy SHARDS to OUT and hold a share of the samples out in OUT/val, for evaluation.

    Near-duplicates stay on one side. After an interruption, run the same command again.
    """
    from data_pipelines.ingest.held_out import VAL, held_out_line
    from data_pipelines.ingest.split import SplitConfig, split
    from data_pipelines.ingest.user_data import kind_of
    from data_pipelines.shards.manifest import resolve, write_manifest

    check_folder(out)
    config, shards = settings(SplitConfig, overrides), resolve(shards)
    kind_of(shards, ("shards",), "xray data split")
    report = split(shards, out, config)
    for folder in [out] + [out / VAL] * bool(report.held_out):
        write_manifest(str(folder), checksum=True, workers=config.workers)
    print(f"{out}: {count(report.samples, 'sample')} in {count(report.shards, 'shard')}")
    print(held_out_line(out / VAL, report.held_out, report.cut))


def _captions_elsewhere(source: str, out: Path, report: PackReport) -> str:
    """Say where captions are read from, for files without one."""
    from data_pipelines.ingest.pack import unread_table
    from data_pipelines.ingest.table_columns import CAPTION_COLUMNS

    if table := unread_table(source, report):
        command = f"xray data pack {shlex.quote(table)} {shlex.quote(str(out))}"
        return f"if {table} has them, delete {out} and pack the table: {command}"
    columns = ", ".join(CAPTION_COLUMNS)
    usual = f"they are read from a.txt beside a.jpg, or the columns {columns}"
    own = ", ".join(report.columns)
    return f"{usual}; or name their column with caption_key=: there are {own}" if own else usual


@guarded
def data_check(
    data: Data,
    workers: Workers = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the findings to this file")
    ] = None,
    cache: Cache = "",
) -> None:
    """Decode every sample and compare tars with their index; exit code 1 if anything is broken."""
    from xray.reports.shards import check_table, findings, summary, totals

    make_room(json_file)
    report = _checked(data, workers, cache)
    if json_file is not None:
        write_in_place(json_file, json.dumps(summary(report), indent=1) + "\n")
    check_table(report).print()
    print(totals(report))
    for line in findings(report, LISTED):
        print(line)
    if report.broken:
        raise SystemExit(1)


@guarded
def data_stats(
    data: Data,
    out: Annotated[Path, typer.Option(help="The page to write")] = Path("stats.html"),
    workers: Workers = 2,
    cache: Cache = "",
) -> None:
    """Write one HTML page of sizes, lengths, tags, languages and a sheet of samples."""
    from xray.reports.shards import totals, write_stats

    make_room(out)
    report = _checked(data, workers, cache)
    write_stats(report, out)
    print(totals(report))
    print(f"statistics in {out}")


@guarded
def data_clean(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of shards")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the files, with their sizes")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also remove what a command made, such as text features")
    ] = False,
) -> None:
    """Remove the files that xray derived from shards (docs/data.md lists them), in the folders and
    below: old and new places, and what interrupted writers left. Tars are never removed.
    """
    from data_pipelines.checks.clean import find_derived, remove
    from data_pipelines.shards.side_files import user_cache
    from xray.reports.clean import clean_table, total

    for folder in folders:
        found = find_derived(folder)
        gone = [item for item in found.derived if everything or not item.kind.costly]
        kept = [item for item in found.derived if item not in gone]
        if found.derived:
            clean_table(str(folder), gone, kept).print()
        if not dry_run:
            remove(gone)
        print(f"{folder}: {total(gone)} {'can be removed' if dry_run else 'removed'}")
        if kept:
            print(
                f"kept: {total(kept)} that a command made, and that recipes may name; --all "
                "removes them, too"
            )
        for path in found.unknown:
            print(f"not removed, because it is damaged or not by xray: {path}")
        for path in found.read_only:
            print(f"{path} is read-only: its side files are in {user_cache('index')}")


def _checked(data: list[str], workers: int, cache: str) -> CheckReport:
    from data_pipelines.checks.check import CheckReport, check
    from data_pipelines.shards.source import make_cache
    from xray.config import DataConfig

    config, reports = DataConfig(cache=cache), list[CheckReport]()
    kept = make_cache(config)
    for pattern in data:
        with progress_bar("reading") as progress:
            reports.append(check(pattern, kept, config, workers, progress))
    return functools.reduce(CheckReport.joined, reports)


@takes("xray.config.model:LlmConfig", "path", "captions")
@guarded
def data_tiny_llm(
    folder: Annotated[str, typer.Argument(help="Folder to write")],
    captions: Annotated[str, typer.Option(help="Data whose captions train the tokenizer")],
    overrides: Overrides = None,
) -> None:
    """Make a small random LLM and its tokenizer, for machines without a pretrained one."""
    from xray.config.model import LlmConfig
    from xray.recipes.run import make_llm

    check_folder(folder)
    config = settings(LlmConfig, overrides)
    config.path, config.captions = folder, captions
    make_llm(config, "")
    print(f"LLM in {folder}")
