"""Numbers in sentences for people: counts with their noun or cause, and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def count(number: float, noun: str, plural: str = "") -> str:
    """Format a count with its noun: 1 shard, 1,234 shards; plural: if it is not the noun with s."""
    return f"{number:,.0f} {noun if number == 1 else plural or noun + 's'}"


def counted(causes: Mapping[str, int]) -> str:
    """List the causes for which samples were left out, with the number of samples of each."""
    return ", ".join(f"{cause}: {n:,}" for cause, n in sorted(causes.items()))


def some_of(names: Sequence[str], most: int = 3) -> str:
    """List the first of several names, and count the others: a, b, c and 1,234 others."""
    others = len(names) - most
    rest = f" and {count(others, 'other')}" if others > 0 else ""
    return ", ".join(names[:most]) + rest


def duration(seconds: float) -> str:
    """Format a time with two units at most: 42 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"
