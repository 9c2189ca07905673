"""Rows of the results table: a measure with its 95 % interval, beside chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

Measures = Mapping[str, float]
Row = tuple[str, str, str, str]  # measure, result, chance, number of samples


def share_row(title: str, measures: Measures, key: str, chance: float, over: str) -> Row:
    """Make the row of a share and of its interval, if it has one, in percent."""
    value = f"{100 * measures[key]:.1f}"
    low, high = interval_keys(key)
    if low in measures:
        value += f" [{100 * measures[low]:.1f}, {100 * measures[high]:.1f}]"
    return title, value, f"{100 * chance:.2f}", over


def rank_row(title: str, measures: Measures, key: str, chance: float, over: str) -> Row:
    """Make the row of a median rank and its interval."""
    low, high = interval_keys(key)
    value = f"place {measures[key]:.1f} [{measures[low]:.1f}, {measures[high]:.1f}]"
    return title, value, f"place {chance:.1f}", over


def top1_rows(title: str) -> Callable[[Measures], Iterator[Row]]:
    """Make the rows of a suite that measures top-1 accuracy alone."""

    def rows(measures: Measures) -> Iterator[Row]:
        over = f"{measures['samples']:.0f} samples"
        yield share_row(title, measures, "top1", measures["chance_top1"], over)

    return rows


def titled(label: str) -> Callable[[str], str]:
    """Make the titles of a suite's measures: its label, then the measure."""
    return lambda measure: f"{label} {measure}".replace("_", " ")


def interval_keys(key: str) -> tuple[str, str]:
    """Return the keys of both ends of a measure's interval: of R@1/64, R@1_low/64 and _high/64."""
    name, slash, prefix = key.partition("/")
    return f"{name}_low{slash}{prefix}", f"{name}_high{slash}{prefix}"
