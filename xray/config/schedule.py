"""Values that change over a stage: a number, or steps `[[progress, value], ...]`."""

from __future__ import annotations

from typing import Any

from xray.errors import ConfigError


def steps_of(schedule: Any) -> list[tuple[float, int]]:
    """The (start, value) steps of a schedule."""
    if isinstance(schedule, int):
        return [(0.0, schedule)]
    return [(float(start), int(value)) for start, value in schedule]


def value_at(schedule: Any, progress: float) -> int:
    """The value of the last step begun at `progress` in [0, 1]."""
    return [value for start, value in steps_of(schedule) if start <= progress][-1]


def largest(schedule: Any) -> int:
    """The largest value a schedule takes."""
    return max(value for _, value in steps_of(schedule))


def check(schedule: Any, key: str, least: int = 1) -> None:
    """Raise ConfigError for anything but an integer, or rising steps from 0.0, of values >= least.

    least: the smallest allowed value.
    """
    form = f"{key}={schedule} must be a whole number or [[0.0, A], [0.5, B], ...]"
    if isinstance(schedule, int) and not isinstance(schedule, bool):
        pairs: list[Any] = [[0.0, schedule]]
    elif isinstance(schedule, list) and schedule:
        pairs = schedule
    else:
        raise ConfigError(form)
    for pair in pairs:
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and isinstance(pair[0], float | int)
            and isinstance(pair[1], int)
        ):
            raise ConfigError(f"{form}: {pair} is no [progress, value]")
        if pair[1] < least:
            raise ConfigError(f"{key}: {pair[1]} must be at least {least}")
    starts = [pair[0] for pair in pairs]
    if starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
        raise ConfigError(f"{key}: the steps {starts} must rise from 0.0 and stay below 1.0")
