"""What a vocabulary was built from, as a table and as a page: Zipf curve, head, tail, dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.tags.vocabulary import Dropped, TagCounts, Vocabulary
from xray.reports.figures import COLOR, pixels_of, subplots
from xray.reports.html import Picture, paragraph, write_report
from xray.reports.tables import ResultTable

SHOWN = 40  # tags of the head, of the tail, and dropped ones of each reason


def dropped_table(
    vocabulary: Vocabulary, counts: TagCounts, dropped: Mapping[str, Dropped]
) -> ResultTable:
    """How many tags and labels are in, and how many are out for which reason."""
    rows: list[Sequence[str]] = [
        ["in the vocabulary", f"{len(vocabulary):,}", f"{sum(vocabulary.counts):,}", ""]
    ]
    merged = len(counts.tags) - len(vocabulary) - sum(found.tags for found in dropped.values())
    if merged > 0:
        rows.append(["merged into another's spelling", f"{merged:,}", "", ""])
    for reason, found in sorted(dropped.items()):
        first = ", ".join(tag for tag, _ in found.first[:5])
        rows.append([reason, f"{found.tags:,}", f"{found.samples:,}", first])
    return ResultTable("Tags", ("", "tags", "labels", "the most frequent"), rows)


def write_tag_report(
    vocabulary: Vocabulary,
    counts: TagCounts,
    dropped: Mapping[str, Dropped],
    examples: Mapping[str, Sequence[str]],
    out: Path,
) -> None:
    """One self-contained page; examples: tag -> captions or keys of samples that have it."""
    ranked = list(zip(vocabulary.tags, vocabulary.counts, strict=True))
    parts = [
        paragraph(summary(vocabulary, counts)),
        _zipf(vocabulary, counts),
        _listed("Head", ranked[:SHOWN], vocabulary, examples),
        _listed("Tail", ranked[SHOWN:][-SHOWN:], vocabulary, examples),
        dropped_table(vocabulary, counts, dropped).html(),
    ]
    for reason, found in sorted(dropped.items()):
        rows: list[Sequence[str]] = [[t, f"{count:,}"] for t, count in found.first[:SHOWN]]
        parts.append(ResultTable(f"Dropped: {reason}", ("tag", "samples"), rows).html())
    write_report(out, "xray: tags", parts)


def summary(vocabulary: Vocabulary, counts: TagCounts) -> str:
    """The vocabulary in one line."""
    labels = sum(vocabulary.counts)
    return (
        f"{len(vocabulary):,} tags of {len(counts.tags):,} that occur; {counts.samples:,} samples, "
        f"{counts.tagged:,} of them tagged; {labels:,} labels, "
        f"{labels / max(1, counts.tagged):.1f} per tagged sample"
    )


def _zipf(vocabulary: Vocabulary, counts: TagCounts) -> str:
    """Samples per tag over the tag's rank, of all tags and of the vocabulary."""
    figure, axes = subplots(1, (6.2, 3.4))
    axis = axes[0]
    everything = np.sort(np.fromiter(counts.tags.values(), np.int64))[::-1]
    for values, name, color in (
        (everything, "all tags", "#b8c4d0"),
        (np.array(vocabulary.counts), "vocabulary", COLOR),
    ):
        axis.loglog(np.arange(1, len(values) + 1), values, label=name, color=color, linewidth=1.6)
    axis.set_xlabel("rank of the tag", fontsize=8)
    axis.set_ylabel("samples", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    slope = zipf_slope(np.array(vocabulary.counts))
    caption = f"Slope of the vocabulary's curve, from rank 10 on: {slope:.2f} (Zipf's law: -1)."
    if np.isnan(slope):
        caption = "Samples per tag, from the most frequent."
    return Picture("Samples per tag", caption, pixels_of(figure)).html()


def zipf_slope(counts: np.ndarray) -> float:
    """Slope of log(count) over log(rank), from rank 10 to the last; nan for fewer than 20 tags."""
    counts = np.sort(counts)[::-1].astype(np.float64)
    if len(counts) < 20:
        return float("nan")
    rank = np.arange(1, len(counts) + 1)
    # Tags are spaced evenly in log(rank), or the many of the tail would be all that counts.
    weight = 1 / np.sqrt(rank[9:])
    return float(np.polyfit(np.log(rank[9:]), np.log(counts[9:]), 1, w=weight)[0])


def _listed(
    title: str,
    ranked: Sequence[tuple[str, int]],
    vocabulary: Vocabulary,
    examples: Mapping[str, Sequence[str]],
) -> str:
    rows: list[Sequence[str]] = []
    for tag, count in ranked:
        number = vocabulary.ids[tag]
        aliases = ", ".join(vocabulary.aliases[number]) if vocabulary.aliases else ""
        rows.append([tag, f"{count:,}", aliases, " | ".join(examples.get(tag, ()))])
    heads = ("tag", "samples", "also", "some of them")
    return ResultTable(title, heads, rows).html() if rows else ""
