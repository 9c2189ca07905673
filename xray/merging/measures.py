"""Measures of mixtures, named SUITE.MEASURE: those that are shown, and those that choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xray.errors import ConfigError, nearest
from xray.evaluation.suite import Measures, interval_keys
from xray.evaluation.suites import suite_named, title_of

LISTED = 6  # measures that an error names
RANK = "median_rank"  # the only kind of measure with an interval of which less is better


def split_measure(measure: str) -> tuple[str, str]:
    """Split SUITE.MEASURE; a measure may contain dots."""
    suite, _, key = measure.partition(".")
    return suite, key


def check_chosen(measures: Sequence[str], suites: Sequence[str]) -> None:
    """Raise ConfigError for a measure of --choose whose suite does not run."""
    for measure in measures:
        suite, key = split_measure(measure)
        if not key or suite not in suites:
            raise ConfigError(
                f"--choose {measure}: write SUITE.MEASURE, such as zero_shot.top1, with a suite "
                f"that runs: {', '.join(suites) or 'none has data'}"
            )


def mean_of(results: Mapping[str, Measures], measures: Sequence[str]) -> float:
    """Return the mean of measures, 0 for none.

    Raises ConfigError for a measure that is no share with an interval.
    """
    values = []
    for measure in measures:
        suite, key = split_measure(measure)
        own = results[suite]
        if key not in own or interval_keys(key)[0] not in own or RANK in key:
            known = [f"{suite}.{name}" for name in own if interval_keys(name)[0] in own]
            known = [name for name in known if RANK not in name]
            raise ConfigError(
                f"--choose {measure}: suite {suite} has {', '.join(known[:LISTED])}"
                f"{' and others' * (len(known) > LISTED)}{nearest(measure, known)}"
            )
        values.append(own[key])
    return sum(values) / max(1, len(values))


def shown_measures(results: Mapping[str, Measures], by: Sequence[str]) -> list[str]:
    """List the measures of tables and figures: `by`, and of each suite those of --keep-rates.

    Of a suite without them, it is the first one that has an interval.
    """
    shown = [*by]
    for suite, measures in results.items():
        first = [key for key in measures if interval_keys(key)[0] in measures][:1]
        shown += [f"{suite}.{key}" for key in suite_named(suite).compared or first]
    return list(dict.fromkeys(shown))


def title(measure: str) -> str:
    """Return the title of a measure in percent, as tables show it."""
    return f"{title_of(*split_measure(measure))} %"


def value_and_ends(results: Mapping[str, Measures], measure: str) -> tuple[float, float, float]:
    """Return a measure and both ends of its interval, in percent."""
    suite, key = split_measure(measure)
    value, low, high = (100 * results[suite][name] for name in (key, *interval_keys(key)))
    return value, low, high


def with_interval(results: Mapping[str, Measures], measure: str) -> str:
    """Format a measure with its interval, in percent."""
    value, low, high = value_and_ends(results, measure)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def chance(results: Mapping[str, Measures], measure: str) -> float | None:
    """Return the chance level of a measure in percent, None if it has none."""
    suite, key = split_measure(measure)
    value = results[suite].get(f"chance_{key}")
    return None if value is None else 100 * value
