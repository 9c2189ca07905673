"""Report of a tag vocabulary: a table, and a page with Zipf curve, head, tail and dropped tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.tags.vocabulary import Dropped, TagCounts, Vocabulary
from xray.reports.figures import COLOR, label_axis, section, subplots
from xray.reports.html import paragraph, write_report
from xray.reports.tables import ResultTable

SHOWN = 40  # number of tags listed for the head, the tail and each reason of dropping


def dropped_table(
    vocabulary: Vocabulary, counts: TagCounts, dropped: Mapping[str, Dropped]
) -> ResultTable:
    """Make the table of tags and labels in the vocabulary, and of those dropped, by reason."""
    table = ResultTable("Tags", ("", "tags", "labels", "most frequent"))
    whole = (f"{len(vocabulary):,}", f"{sum(vocabulary.counts):,}")
    table.rows.append(("in the vocabulary", *whole, ""))
    merged = len(counts.tags) - len(vocabulary) - sum(group.tags for group in dropped.values())
    if merged > 0:
        table.rows.append(("merged with another spelling", f"{merged:,}", "", ""))
    for reason, group in sorted(dropped.items()):
        first = ", ".join(tag for tag, _ in group.first[:5])
        table.rows.append((reason, f"{group.tags:,}", f"{group.samples:,}", first))
    return table


def write_tag_report(
    vocabulary: Vocabulary,
    counts: TagCounts,
    dropped: Mapping[str, Dropped],
    examples: Mapping[str, Sequence[str]],
    out: Path,
) -> None:
    """Write a self-contained page; examples: captions or keys of samples, by their tag."""
    ranked = list(zip(vocabulary.tags, vocabulary.counts, strict=True))
    parts = [
        paragraph(summary(vocabulary, counts)),
        _zipf(vocabulary, counts),
        _tag_table("Head", ranked[:SHOWN], vocabulary, examples),
        _tag_table("Tail", ranked[SHOWN:][-SHOWN:], vocabulary, examples),
        dropped_table(vocabulary, counts, dropped).html(),
    ]
    for reason, group in sorted(dropped.items()):
        rows: list[Sequence[str]] = [[t, f"{count:,}"] for t, count in group.first[:SHOWN]]
        parts.append(ResultTable(f"Dropped: {reason}", ("tag", "samples"), rows).html())
    write_report(out, "xray: tags", parts)


def summary(vocabulary: Vocabulary, counts: TagCounts) -> str:
    """Summarise the vocabulary in one line."""
    labels = sum(vocabulary.counts)
    return (
        f"{len(vocabulary):,} of {len(counts.tags):,} different tags; {counts.samples:,} samples, "
        f"{counts.tagged:,} of them tagged; {labels:,} labels, "
        f"{labels / max(1, counts.tagged):.1f} per tagged sample"
    )


def _zipf(vocabulary: Vocabulary, counts: TagCounts) -> str:
    """Draw samples per tag over the tag's rank, for all tags and for the vocabulary."""
    figure, (axis,) = subplots(1, (6.2, 3.4))
    all_counts = np.sort(np.fromiter(counts.tags.values(), np.int64))[::-1]
    for values, name, color in (
        (all_counts, "all tags", "#b8c4d0"),
        (np.array(vocabulary.counts), "vocabulary", COLOR),
    ):
        axis.loglog(np.arange(1, len(values) + 1), values, label=name, color=color, linewidth=1.6)
    label_axis(axis, "rank of the tag", "samples")
    axis.legend(fontsize=7, frameon=False)
    slope = zipf_slope(np.array(vocabulary.counts))
    caption = f"Slope of the vocabulary's curve, from rank 10 on: {slope:.2f} (Zipf's law: -1)."
    if np.isnan(slope):
        caption = "Samples per tag, from the most frequent."
    return section("Samples per tag", caption, figure)


def zipf_slope(counts: np.ndarray) -> float:
    """Fit the slope of log(count) over log(rank), from rank 10; nan for fewer than 20 tags."""
    counts = np.sort(counts)[::-1].astype(np.float64)
    if len(counts) < 20:
        return float("nan")
    rank = np.arange(1, len(counts) + 1)
    # weigh ranks evenly in log(rank): without weights, the many tags of the tail dominate the fit
    weight = 1 / np.sqrt(rank[9:])
    return float(np.polyfit(np.log(rank[9:]), np.log(counts[9:]), 1, w=weight)[0])


def _tag_table(
    title: str,
    ranked: Sequence[tuple[str, int]],
    vocabulary: Vocabulary,
    examples: Mapping[str, Sequence[str]],
) -> str:
    table = ResultTable(title, ("tag", "samples", "aliases", "examples"))
    for tag, count in ranked:
        number = vocabulary.ids[tag]
        aliases = ", ".join(vocabulary.aliases[number]) if vocabulary.aliases else ""
        table.rows.append((tag, f"{count:,}", aliases, "\n".join(examples.get(tag, ()))))
    return table.html() if table.rows else ""
