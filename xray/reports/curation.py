"""Report of a curation: tables for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.checks.check_shard import Thumbnail, png_of
from data_pipelines.curation.report import CurationReport, EntryRow
from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import find_captions
from data_pipelines.text.names import name_at
from xray.config import DataConfig
from xray.errors import BadSample
from xray.files import printable
from xray.reports.figures import COLOR, figures, label_axis, subplots
from xray.reports.html import write_report
from xray.reports.shards import sheet
from xray.reports.tables import ResultTable

SIDE = 128  # side of a thumbnail, in pixels
SHARDS_SEARCHED = 50  # thumbnails are taken from this many shards at most


def example_places(report: CurationReport, source: Source) -> dict[str, tuple[int, int]]:
    """Find the example samples of a report in the first shards: key -> (shard, member)."""
    keys = {*report.kept_keys, *(key for step in report.steps for key in step.keys)}
    found: dict[str, tuple[int, int]] = {}
    for shard in range(min(SHARDS_SEARCHED, len(source.manifest))):
        if len(found) == len(keys):
            break
        for member, key in enumerate(map(printable, source.index(shard).keys)):
            if key in keys:
                found.setdefault(key, (shard, member))
    return found


def names_in(source: Source, places: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Return the original file names of samples, by key."""
    return {key: name_at(source, *place) for key, place in places.items()}


def step_table(report: CurationReport, names: Mapping[str, str]) -> ResultTable:
    """Make the table of samples and texts read, removed by each step, and kept."""
    lines: list[tuple[str, int, int, Sequence[str]]] = [("read", *report.read, ())]
    lines += [(step.name, -step.samples, -step.texts, step.keys) for step in report.steps]
    lines.append(("kept", *report.kept, report.kept_keys))
    table = ResultTable("Curation", ("step", "samples", "texts", "e.g."))
    for name, samples, texts, keys in lines:
        shown = "\n".join(names.get(key, key) for key in keys[:3])
        table.rows.append((name, f"{samples:,}", f"{texts:,}", shown))
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


def tables(report: CurationReport, names: Mapping[str, str]) -> list[ResultTable]:
    """Return the table of steps and, if there are any, those of languages and evaluation sets.

    names: of samples, by key.
    """
    result = [step_table(report, names)]
    if report.settings["metadata"] != "none":
        result.append(language_table(report))
    return [*result, leak_table(report)] if report.leaks else result


def write_curation_page(report: CurationReport, source: Source, out: Path) -> None:
    """Write a self-contained page: steps, languages, balance, entries and sheets of samples."""
    places = example_places(report, source)
    names = names_in(source, places)
    parts = [table.html() for table in tables(report, names)]
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
    pictures = {key: _picture(source, place, key, names) for key, place in places.items()}
    parts += [
        sheet(name, [p for k in keys if (p := pictures.get(k)) is not None])
        for name, keys in sheets
    ]
    write_report(out, "xray: curation", parts)


def _curve(report: CurationReport) -> str:
    """Draw cumulative matches over entries, from the rarest, before and after balancing."""
    if not report.curve.get("rank"):
        return ""
    panels = []
    for label in ("matches", "share of the matches"):
        figure, (axis,) = subplots(1, (3.7, 3.0))
        for name, color in (("before", "#b8c4d0"), ("after", COLOR)):
            total = max(1.0, report.curve[name][-1]) if label != "matches" else 1.0
            values = [value / total for value in report.curve[name]]
            axis.plot(report.curve["rank"], values, label=name, color=color)
        label_axis(axis, "entries, from the rarest", label)
        axis.legend(fontsize=7, frameon=False)
        panels.append((figure, label))
    caption = "Balancing removes texts of frequent entries and keeps those of rare entries."
    return figures("Balance", caption, panels)


def _entries(title: str, rows: Sequence[EntryRow]) -> str:
    table = ResultTable(title, ("entry", "language", "texts", "kept", "probability"))
    for row in rows:
        counts = (f"{row.before:,}", f"{row.after:,}", f"{row.rate:.3f}")
        table.rows.append((row.entry, row.language, *counts))
    return table.html() if table.rows else ""


def _picture(
    source: Source, place: tuple[int, int], key: str, names: Mapping[str, str]
) -> Thumbnail | None:
    """Load the thumbnail of a sample; None if it cannot be decoded."""
    try:
        sample = source.sample(*place, SIDE, 1)
        pixels = load_pixels(sample, DataConfig(), None)[0].permute(1, 2, 0).numpy()
    except BadSample:
        return None
    caption = printable(next(iter(find_captions(source, *place)), ""))
    return Thumbnail("", "", key, caption, png_of(pixels), names[key])
