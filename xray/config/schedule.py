"""Schedules: a number, or steps `[[progress, value], ...]` over the progress of a stage."""

from __future__ import annotations

from typing import Any

from xray.errors import ConfigError


def steps_of(schedule: Any) -> list[tuple[float, int]]:
    """Return the (start, value) steps of a schedule."""
    if isinstance(schedule, int):
        return [(0.0, schedule)]
    return [(float(start), int(value)) for start, value in schedule]


def value_at(schedule: Any, progress: float) -> int:
    """Return the value of a schedule at `progress` in [0, 1]."""
    return [value for start, value in steps_of(schedule) if start <= progress][-1]


def largest(schedule: Any) -> int:
    """Return the largest value of a schedule."""
    return max(value for _, value in steps_of(schedule))


def check(schedule: Any, key: str, least: int = 1) -> None:
    """Check a schedule: an integer, or steps that rise from progress 0.0.

    least: the smallest value allowed. Raises ConfigError that names `key`.
    """
    form = f"{key}={schedule} must be a whole number or [[0.0, A], [0.5, B], ...]"
    whole = isinstance(schedule, int) and not isinstance(schedule, bool)
    pairs: list[Any] = [[0.0, schedule]] if whole else schedule
    if not isinstance(pairs, list) or not pairs:
        raise ConfigError(form)
    for pair in pairs:
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and isinstance(pair[0], float | int)
            and isinstance(pair[1], int)
        ):
            raise ConfigError(f"{form}: {pair} is not [progress, value]")
        if pair[1] < least:
            raise ConfigError(f"{key}: {pair[1]} must be at least {least}")
    starts = [pair[0] for pair in pairs]
    if starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
        raise ConfigError(f"{key}: the steps {starts} must rise from 0.0 and stay below 1.0")
