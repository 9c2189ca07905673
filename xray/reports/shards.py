"""Report of a check of shards: a table, text lines, and a page with figures and pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.checks.check import CheckReport
from data_pipelines.checks.check_shard import Media, Range, ShardCheck, Stats, Thumbnail
from data_pipelines.text.names import with_key
from xray.reports.figures import COLOR, figures, label_axis, subplots
from xray.reports.html import bars, folded, paragraph, write_report
from xray.reports.tables import ResultTable
from xray.words import count

ROWS = 40  # with more shards, the table lists only the broken ones
TAGS = 30  # number of tags shown
BINS = 40
COLUMNS = (
    "shard", "samples", "images", "clips", "MB", "min mean max", "clip s", "no caption", "state"
)  # fmt: skip
# (name of a histogram in Stats.numbers, label of its axis)
SIZES = (("width", "width"), ("height", "height"), ("aspect", "width / height"))
LENGTHS = (("seconds", "seconds of a clip"), ("frames", "frames of a clip"))
TEXTS = (("words", "words of a caption"), ("captions", "captions of a sample"))


def check_table(report: CheckReport) -> ResultTable:
    """Make a table with one row per shard (only broken ones of many) and one for their total.

    Empty columns are left out, because all nine fill a terminal.
    """
    listed = report.shards
    if len(listed) > ROWS:
        listed = [shard for shard in listed if shard.error or shard.causes]
    names = ["/".join(s.path.removesuffix(".tar").split("/")[-2:]) for s in listed]
    rows = [_row(shard, name) for shard, name in zip(listed, names, strict=True)]
    if len(report.shards) > 1:
        *cells, _ = _row(_total(report), f"all {len(report.shards):,}")
        rows.append((*cells, "broken" if report.broken else "ok"))
    filled = [any(column) for column in zip(*rows, strict=True)]
    columns = tuple(compress(COLUMNS, filled))
    return ResultTable(report.pattern, columns, [tuple(compress(row, filled)) for row in rows])


def totals(report: CheckReport) -> str:
    """Summarise all shards in one line, by modality."""
    total = _total(report)
    parts = [count(len(report.shards), "shard"), count(total.samples, "sample")]
    for name, media in (("images", total.images), ("clips", total.clips)):
        if media.samples:
            usable = f"{media.usable:,} of {media.samples:,} {name} usable"
            parts.append(f"{usable}, {media.captioned:,} captioned")
    if total.without_caption:
        first = next(s for s in report.shards if s.without_caption)
        name = with_key(first.first_without_caption_name, first.first_without_caption)
        where = f"first {name} in {first.path}"
        parts.append(f"{total.without_caption:,} without caption ({where})")
    if total.system_files:
        parts.append(f"{count(total.system_files, 'system or hidden file')} left out")
    causes = [f"{number:,} {cause}" for cause, number in sorted(total.causes.items())]
    if errors := sum(bool(shard.error) for shard in report.shards):
        causes.append(count(errors, "broken shard"))
    return f"{'; '.join(parts)}: {', '.join(causes) if causes else 'no errors'}"


def findings(report: CheckReport, most: int) -> list[str]:
    """List broken shards, then at most `most` bad samples, one line each."""
    lines = [shard.error for shard in report.shards if shard.error]
    bad = [bad for shard in report.shards for bad in shard.bad]
    lines += [f"{b.shard}, {with_key(b.name, b.key)}, {b.cause}: {b.detail}" for b in bad[:most]]
    not_listed = sum(sum(shard.causes.values()) for shard in report.shards) - len(bad[:most])
    lines += [f"and {not_listed:,} more"] if not_listed else []
    return [" ".join(line.split()) for line in lines]


def summary(report: CheckReport) -> dict[str, Any]:
    """Return the report as JSON, without the pictures and the rarer tags."""
    content = asdict(report)
    del content["stats"]["sheet"]
    if "hashtag" in report.stats.names:
        content["stats"]["names"]["hashtag"] = dict(_top(report.stats, "hashtag"))
    return content


def _total(report: CheckReport) -> ShardCheck:
    total = ShardCheck("")
    for shard in report.shards:
        total.samples += shard.samples
        total.bytes += shard.bytes
        total.seconds += shard.seconds
        total.without_caption += shard.without_caption
        total.system_files += shard.system_files
        for sums, media in ((total.images, shard.images), (total.clips, shard.clips)):
            sums.samples += media.samples
            sums.usable += media.usable
            sums.captioned += media.captioned
        for cause, number in shard.causes.items():
            total.causes[cause] = total.causes.get(cause, 0) + number
    total.width, total.height = report.stats.range("width"), report.stats.range("height")
    return total


def _row(shard: ShardCheck, name: str) -> Sequence[str]:
    return (
        name,
        f"{shard.samples:,}",
        _usable(shard.images),
        _usable(shard.clips),
        f"{shard.bytes / 1e6:,.1f}",
        _size(shard.width, shard.height),
        f"{shard.seconds:,.1f}" if shard.seconds else "",
        f"{shard.without_caption:,}" if shard.without_caption else "",
        _state(shard),
    )


def _usable(media: Media) -> str:
    if media.usable == media.samples:
        return f"{media.samples:,}" if media.samples else ""
    return f"{media.usable:,} of {media.samples:,}"


def _size(width: Range, height: Range) -> str:
    if not width.most:
        return ""
    pairs = ((width.least, height.least), (width.mean, height.mean), (width.most, height.most))
    return "\n".join(dict.fromkeys(f"{w:.0f}x{h:.0f}" for w, h in pairs))


def _state(shard: ShardCheck) -> str:
    if shard.matches_index is False or shard.matches_sha256 is False:
        return "changed"
    if shard.error:
        return "unreadable"
    if shard.causes:
        return f"{sum(shard.causes.values()):,} bad"
    return "sha256 ok" if shard.matches_sha256 else "ok"


def write_stats(report: CheckReport, out: Path) -> None:
    """Write a self-contained page with histograms, bar charts and a sheet of samples."""
    stats = report.stats
    sizes = "Sizes of images and clips in pixels, after rotation to upright."
    languages = "Languages of captions, for samples that name one."
    parts = [
        paragraph(totals(report)),
        _figure("Sizes", sizes, stats, SIZES),
        _figure("Clips", "Lengths of clips.", stats, LENGTHS),
        _figure("Captions", "Lengths of captions, and their number per sample.", stats, TEXTS),
        bars("Tags", f"The {TAGS} most frequent hashtags.", _top(stats, "hashtag")),
        bars("Languages", languages, _top(stats, "language")),
        bars("Files", "Usable media by file extension.", _top(stats, "extension")),
        sheet("Samples", stats.sheet),
        check_table(report).html(),
    ]
    write_report(out, "xray: data", parts)


def _top(stats: Stats, name: str) -> list[tuple[str, int]]:
    """Return the most frequent names with their counts, equal ones by name."""
    counted = stats.names.get(name, {}).items()
    return sorted(counted, key=lambda item: (-item[1], item[0]))[:TAGS]


def _figure(title: str, caption: str, stats: Stats, panels: Sequence[tuple[str, str]]) -> str:
    """Draw histograms side by side; return "" if there are no values."""
    histograms = [(stats.numbers[name], label) for name, label in panels if name in stats.numbers]
    if not histograms:
        return ""
    panels = []
    for counts, label in histograms:
        figure, (axis,) = subplots(1, (3.1, 2.5))
        _histogram(axis, counts)
        label_axis(axis, label)
        panels.append((figure, label))
    return figures(title, caption, panels)


def _histogram(axis: Any, counts: Mapping[float, int]) -> None:
    values, weights = list(counts), list(counts.values())
    if len(values) == 1:  # a histogram would be one bar as wide as the axis
        axis.bar(values, weights, width=0.2, color=COLOR)
        axis.set_xlim(values[0] - 1, values[0] + 1)
        axis.set_xticks(values, [f"{values[0]:g}"])
        return
    integer = all(float(value).is_integer() for value in values)
    axis.hist(values, bins=_bins(min(values), max(values), integer), weights=weights, color=COLOR)


def _bins(low: float, high: float, integer: bool) -> np.ndarray:
    """Return the edges of equal bins; for integers, each bin covers equally many integers."""
    if integer:
        step = max(1, round((high - low + 1) / BINS))
        return np.arange(low, high + 1 + step, step) - 0.5
    return np.linspace(low, high, BINS + 1)


def sheet(title: str, thumbnails: Sequence[Thumbnail]) -> str:
    """Lay out thumbnails in rows with name and caption; return "" if there are none."""
    if not thumbnails:
        return ""
    cells = "".join(map(_cell, thumbnails))
    return f"<h2>{html.escape(title)}</h2><div class=sheet>{cells}</div>"


def _cell(shown: Thumbnail) -> str:
    name, key = html.escape(shown.name or shown.key), html.escape(shown.key)
    image = f'<img alt="{name}" src="data:image/png;base64,{shown.png}">'
    if shown.link:
        image = f'<a href="{html.escape(shown.link)}">{image}</a>'
    lines = [f'<code title="{key}">{name}</code>']
    lines += [f"<div dir=auto>{folded(shown.caption)}</div>"] if shown.caption else []
    lines += [f"<small>{html.escape(shown.detail)}</small>"] if shown.detail else []
    return f"<figure>{image}<figcaption>{''.join(lines)}</figcaption></figure>"
