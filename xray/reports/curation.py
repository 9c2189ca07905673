"""Report of a curation: tables for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.checks.check_shard import Thumbnail, png_of
from data_pipelines.curation.report import CurationReport, EntryRow
from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import find_captions
from xray.config import DataConfig
from xray.errors import BadSample
from xray.files import printable
from xray.reports.figures import COLOR, label_axis, section, subplots
from xray.reports.html import write_report
from xray.reports.shards import sheet
from xray.reports.tables import ResultTable

SIDE = 128  # side of a thumbnail, in pixels
SHARDS_SEARCHED = 50  # thumbnails are taken from this many shards at most


def step_table(report: CurationReport) -> ResultTable:
    """Make the table of samples and texts read, removed by each step, and kept."""
    lines: list[tuple[str, int, int, Sequence[str]]] = [("read", *report.read, ())]
    lines += [(step.name, -step.samples, -step.texts, step.keys) for step in report.steps]
    lines.append(("kept", *report.kept, report.kept_keys))
    table = ResultTable("Curation", ("step", "samples", "texts", "e.g."))
    for name, samples, texts, keys in lines:
        table.rows.append((name, f"{samples:,}", f"{texts:,}", ", ".join(keys[:3])))
    return table


def language_table(report: CurationReport) -> ResultTable:
    """Make the table of thresholds, tail shares and counts by language."""
    heads = ("language", "t", "tail share", "entries", "unmatched", "texts", "kept")
    table = ResultTable("Languages", heads)
    for row in report.languages:
        counts = [f"{n:,}" for n in (row.entries, row.unmatched, row.before, row.after)]
        shares = (f"{row.t:,.0f}", f"{row.tail_share:.1%}")
        table.rows.append((row.language or "all", *shares, *counts))
    return table


def leak_table(report: CurationReport) -> ResultTable:
    """Make the table of samples that also occur in an evaluation set."""
    rows = [[name, *(f"{n:,}" for n in kinds.values())] for name, kinds in report.leaks.items()]
    kinds = next(iter(report.leaks.values()), {})
    return ResultTable("Samples of evaluation sets", ("evaluation set", *kinds), list(rows))


def tables(report: CurationReport) -> list[ResultTable]:
    """Return the table of steps and, if there are any, those of languages and evaluation sets."""
    result = [step_table(report)]
    if report.settings["metadata"] != "none":
        result.append(language_table(report))
    return [*result, leak_table(report)] if report.leaks else result


def write_curation_page(report: CurationReport, source: Source, out: Path) -> None:
    """Write a self-contained page: steps, languages, balance, entries and sheets of samples."""
    parts = [table.html() for table in tables(report)]
    if report.settings["metadata"] != "none":
        parts += [
            _curve(report),
            _entries("Entries with the most texts", report.top),
            _entries("Entries with the fewest texts", report.tail),
        ]
    if report.unknown_languages:
        rows = [[name or "(none)", f"{n:,}"] for name, n in report.unknown_languages.items()]
        parts.append(ResultTable("Without metadata", ("language", "texts"), list(rows)).html())
    sheets = [("Kept", report.kept_keys)]
    sheets += [(f"Dropped: {step.name}", step.keys) for step in report.steps if step.keys]
    pictures = _pictures(source, {key for _, keys in sheets for key in keys})
    parts += [sheet(name, [pictures[k] for k in keys if k in pictures]) for name, keys in sheets]
    write_report(out, "xray: curation", parts)


def _curve(report: CurationReport) -> str:
    """Draw cumulative matches over entries, from the rarest, before and after balancing."""
    if not report.curve.get("rank"):
        return ""
    figure, axes = subplots(2, (7.4, 3.0))
    for name, color in (("before", "#b8c4d0"), ("after", COLOR)):
        axes[0].plot(report.curve["rank"], report.curve[name], label=name, color=color)
        total = max(1.0, report.curve[name][-1])
        shares = [value / total for value in report.curve[name]]
        axes[1].plot(report.curve["rank"], shares, label=name, color=color)
    for axis, label in zip(axes, ("matches", "share of the matches"), strict=True):
        label_axis(axis, "entries, from the rarest", label)
    axes[0].legend(fontsize=7, frameon=False)
    caption = "Balancing removes texts of frequent entries and keeps those of rare entries."
    return section("Balance", caption, figure)


def _entries(title: str, rows: Sequence[EntryRow]) -> str:
    table = ResultTable(title, ("entry", "language", "texts", "kept", "probability"))
    for row in rows:
        counts = (f"{row.before:,}", f"{row.after:,}", f"{row.rate:.3f}")
        table.rows.append((row.entry, row.language, *counts))
    return table.html() if table.rows else ""


def _pictures(source: Source, keys: set[str]) -> dict[str, Thumbnail]:
    """Load thumbnails of the samples with these keys from the first shards, by key."""
    thumbnails: dict[str, Thumbnail] = {}
    for shard in range(min(SHARDS_SEARCHED, len(source.manifest))):
        for member, key in enumerate(map(printable, source.index(shard).keys)):
            if key in keys - thumbnails.keys():
                try:
                    sample = source.sample(shard, member, SIDE, 1)
                    pixels = load_pixels(sample, DataConfig(), None)[0].permute(1, 2, 0).numpy()
                except BadSample:
                    continue
                caption = next(iter(find_captions(source, shard, member)), "")[:120]
                thumbnails[key] = Thumbnail("", "", key, caption, png_of(pixels))
        if len(thumbnails) == len(keys):
            break
    return thumbnails
