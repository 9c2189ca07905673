"""Report of a curation as plain data, to print, to plot or to save as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipelines.curation.balance import Balance, tail_share, take_rows
from data_pipelines.curation.config import CurationConfig
from data_pipelines.curation.filters import EXAMPLES, filters_on, place_of, read_tally
from data_pipelines.curation.metadata import Metadata
from data_pipelines.curation.pool import Decision
from data_pipelines.curation.tables import TextTables, unknown_languages
from data_pipelines.shards.sidecar import Sidecar
from xray.files import printable

SHOWN = 50  # entries to list: those with the most texts, and as many with the fewest
POINTS = 512  # maximum number of points of a curve


@dataclass
class Step:
    """Number of samples and texts that a filter or the sampling dropped, with example keys."""

    name: str
    samples: int = 0
    texts: int = 0
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EntryRow:
    """Number of texts that match an entry, before and after the sampling, and its rate p_e."""

    language: str
    entry: str
    before: int
    after: int
    rate: float


@dataclass(frozen=True)
class LanguageRow:
    """Statistics of a language."""

    language: str
    t: float  # its threshold
    tail_share: float  # share of its matches with entries of fewer than t matches
    entries: int  # number of its entries
    unmatched: int  # entries without a match
    before: int  # texts with a match, before the sampling
    after: int  # and after it


@dataclass
class CurationReport:
    """Report of a curation.

    read, matched, kept: (samples, texts) of the pool, of the input of the sampling, and of the
    result. steps: in the order in which they ran. curve: entries sorted by ascending count, as
    lists rank, count, and cumulative number of matches before and after the sampling. top,
    tail: entries with the most and the fewest texts. leaks: evaluation set -> samples of the pool
    with the same bytes (exact) and with a similar image (perceptual).
    """

    source: str
    read: tuple[int, int] = (0, 0)
    matched: tuple[int, int] = (0, 0)
    kept: tuple[int, int] = (0, 0)
    steps: list[Step] = field(default_factory=list)
    languages: list[LanguageRow] = field(default_factory=list)
    unknown_languages: dict[str, int] = field(default_factory=dict)
    top: list[EntryRow] = field(default_factory=list)
    tail: list[EntryRow] = field(default_factory=list)
    curve: dict[str, list[float]] = field(default_factory=dict)
    leaks: dict[str, dict[str, int]] = field(default_factory=dict)
    kept_keys: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def losses(self) -> str:
        """List how many samples each step dropped, as text."""
        losses = [f"{step.name} {step.samples:,}" for step in self.steps if step.samples]
        return ", ".join(losses) or "nothing"


def report_on_texts(texts: Sidecar, decision: Decision, config: CurationConfig) -> CurationReport:
    """Make the part of a report that does not depend on the sampling."""
    report = CurationReport(texts.source.name, leaks=decision.leaks, settings=asdict(config))
    steps, unknown, read = dict[str, Step](), Counter[str](), np.zeros(2, np.int64)
    for shard in range(len(texts.counts)):
        table, index = texts.table(shard), texts.source.index(shard)
        read += table["read"]
        unknown.update(unknown_languages(table))
        for name, taken in read_tally(table).items():
            step = steps.setdefault(name, Step(name))
            step.samples += taken.samples
            step.texts += taken.texts
            room = EXAMPLES - len(step.keys)
            step.keys += [printable(index.key(member)) for member in taken.members[:room]]
    later = [Step(name, t.samples, t.texts, t.keys) for name, t in decision.steps.items()]
    for name in filters_on(config.filters):  # also list filters that dropped nothing
        steps.setdefault(name, Step(name))
    report.read = (int(read[0]), int(read[1]))
    report.steps = [*sorted(steps.values(), key=lambda step: place_of(step.name)), *later]
    report.unknown_languages = dict(unknown.most_common())
    return report


def add_sampling(
    report: CurationReport, pool: TextTables, kept: Sidecar, metadata: Metadata, drawn: Balance
) -> None:
    """Add the input and the result of the sampling to a report."""
    after = np.zeros(len(metadata), np.int64)
    languages = len(metadata.languages)
    texts = np.zeros((2, languages), np.int64)  # before and after
    matched, kept_totals, dropped = np.zeros(2, np.int64), np.zeros(2, np.int64), list[str]()
    for shard, matches in enumerate(pool):
        table, index = kept.table(shard), pool.texts.source.index(shard)
        entries, _ = take_rows(matches.entries, matches.entry_ends, table["rows"])
        after += np.bincount(entries, minlength=len(after))
        # All entries that match a text belong to its language.
        language_of = metadata.languages_of(matches.entries[matches.entry_ends - 1])
        texts[0] += np.bincount(language_of, minlength=languages)
        texts[1] += np.bincount(language_of[table["rows"]], minlength=languages)
        members = pool.members(shard)[matches.sizes > 0]
        matched += len(members), len(matches.texts)
        kept_totals += len(table["members"]), len(table["texts"])
        if len(dropped) < EXAMPLES:
            examples = np.setdiff1d(members, table["members"])[: EXAMPLES - len(dropped)]
            dropped += [printable(index.key(member)) for member in examples.tolist()]
        room = EXAMPLES - len(report.kept_keys)
        report.kept_keys += [printable(index.key(m)) for m in table["members"][:room].tolist()]
    report.matched, report.kept = _pair(matched), _pair(kept_totals)
    report.steps.append(Step("balance", *_pair(matched - kept_totals), dropped))
    report.curve = _curve(drawn.counts, after)
    report.languages = [
        _language(metadata, drawn, number, texts[:, number]) for number in range(languages)
    ]
    _add_entries(report, metadata, drawn, after)


def _add_entries(
    report: CurationReport, metadata: Metadata, drawn: Balance, after: np.ndarray
) -> None:
    """List the entries with the most and the fewest texts."""
    order = np.argsort(-drawn.counts, kind="stable")
    matched = order[: int((drawn.counts > 0).sum())]
    rows = {
        entry: EntryRow(
            *metadata.entry(entry),
            int(drawn.counts[entry]),
            int(after[entry]),
            float(drawn.rates[entry]),
        )
        for entry in [*matched[:SHOWN].tolist(), *matched[-SHOWN:].tolist()]
    }
    report.top = [rows[entry] for entry in matched[:SHOWN].tolist()]
    report.tail = [rows[entry] for entry in matched[SHOWN:][-SHOWN:].tolist()]


def _language(metadata: Metadata, drawn: Balance, number: int, texts: np.ndarray) -> LanguageRow:
    counts, t = drawn.counts[metadata.slice(number)], drawn.thresholds[number]
    sizes = len(counts), int((counts == 0).sum())
    return LanguageRow(metadata.languages[number], t, tail_share(counts, t), *sizes, *_pair(texts))


def _pair(numbers: np.ndarray) -> tuple[int, int]:
    return int(numbers[0]), int(numbers[1])


def _curve(before: np.ndarray, after: np.ndarray) -> dict[str, list[float]]:
    order = np.argsort(before, kind="stable")
    order = order[before[order] > 0]
    if not len(order):
        return {"rank": [], "count": [], "before": [], "after": []}
    points = np.unique(np.linspace(0, len(order) - 1, min(POINTS, len(order))).astype(int))
    return {
        "rank": points.tolist(),
        "count": before[order][points].tolist(),
        "before": np.cumsum(before[order])[points].tolist(),
        "after": np.cumsum(after[order])[points].tolist(),
    }
