"""Page of the results of named sets: means, a chart for each measure, and all results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xray.evaluation.set_runs import SetResults
from xray.evaluation.set_tables import compared_sets, for_page, mean_table, whole_table
from xray.evaluation.suite import Measures, Suite, ends_of
from xray.evaluation.suites import SUITES
from xray.reports.figures import COLOURS, label_axis, subplots, svg
from xray.reports.html import gallery, paragraph, write_report

WIDTH, ROW, HEAD = 4.4, 0.24, 1.1  # inches: a phone's width; height of a set, and of the rest
Points = dict[str, dict[str, Measures]]  # by set and model


def write_page(path: Path, results: Mapping[str, SetResults], notes: list[str]) -> None:
    """Write the page of one model or of several. notes: more lines about the results."""
    if len(results) > 1:
        table, means = compared_sets(results, means=False), mean_table(results)
    else:
        (only,) = results.values()
        table, means = whole_table(only), mean_table({"": only})
    charts = [
        svg(_chart(suite, key, points, list(results)), f"{suite.title(key)} of each set")
        for suite, key, points in _panels(results)
    ]
    how = "A dot is a result, with its 95 % interval; a grey line is chance."
    parts = [for_page(means).html()] if means.rows else []
    parts += [gallery("Each set", charts), paragraph(how), for_page(table).html()]
    parts += map(paragraph, notes)
    write_report(path, f"xray: {' and '.join(results)} on data sets", parts)


def _panels(results: Mapping[str, SetResults]) -> Iterator[tuple[Suite[Any], str, Points]]:
    """Yield (suite, measure, its values) of the measures that are drawn."""
    for suite in SUITES:
        panels: dict[str, Points] = defaultdict(lambda: defaultdict(dict))
        for model, sets in results.items():
            for name, own in sets.items():
                if suite.name in own:
                    measures = own[suite.name].measures
                    for key in _main(suite, measures):
                        panels[key][name][model] = measures
        for key, points in panels.items():
            yield suite, key, points


def _main(suite: Suite[Any], measures: Measures) -> list[str]:
    """Return the measures that are drawn: those that --keep-rates compares, or the first share."""
    shares = [key for key in measures if ends_of(key, measures)]
    return [key for key in suite.compared if key in measures] or shares[:1]


def _chart(suite: Suite[Any], key: str, points: Points, models: list[str]) -> Any:
    """Draw a row for each set, with a dot for each model."""
    figure, (axis,) = subplots(1, (WIDTH, HEAD + ROW * len(points)))
    for place, own in enumerate(points.values()):
        for number, model in enumerate(models):
            if model not in own:
                continue
            value, chance = own[model][key], own[model].get(f"chance_{key}")
            at = place + 0.16 * (number - (len(models) - 1) / 2)
            colour = COLOURS[number % len(COLOURS)]
            if ends := [100 * own[model][end] for end in ends_of(key, own[model])]:
                axis.plot(ends, [at, at], color=colour, linewidth=1.2, alpha=0.6)
            axis.plot([100 * value], [at], "o", color=colour, markersize=4)
            if chance is not None:
                span = [place - 0.35, place + 0.35]
                axis.plot([100 * chance] * 2, span, color="#8c959f", linewidth=1)
    names = [name if len(name) <= 22 else f"{name[:21]}…" for name in points]
    axis.set_yticks(range(len(points)), names)
    axis.set_ylim(len(points) - 0.4, -0.6)
    axis.set_xlim(-2, 102)
    axis.set_title(suite.title(key), fontsize=10)
    axis.grid(axis="x", alpha=0.25)
    label_axis(axis, "%")
    if len(models) > 1:
        for number, model in enumerate(models):
            axis.plot([], [], "o", color=COLOURS[number % len(COLOURS)], label=model, markersize=4)
        axis.legend(fontsize=7, frameon=False)
    return figure
