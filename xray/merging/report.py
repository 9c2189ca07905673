"""Table, figures and page of the mixtures that were evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xray.artifacts.artifact import Artifact
from xray.evaluation.suite import Measures
from xray.merging.measures import (
    chance,
    split_measure,
    title,
    value_and_ends,
    with_interval,
)
from xray.merging.mixtures import Mixture
from xray.reports.figures import COLOR, label_axis, subplots, svg
from xray.reports.html import gallery, paragraph, write_report
from xray.reports.tables import ResultTable

PAGE = "merge.html"
CHOSEN = "#b4552d"
Measured = Sequence[tuple[Mixture, Mapping[str, Measures]]]


def mixture_table(
    measured: Measured, measures: Sequence[str], chosen: Mixture | None, on_line: bool
) -> ResultTable:
    """Make a table with a row per mixture; the chosen one has a star."""
    first = "alpha" if on_line else "members"
    table = ResultTable("Mixtures, with 95 % intervals", (first, *map(title, measures)))
    for mixture, results in measured:
        name = mixture.name + " *" * (mixture == chosen)
        table.rows.append((name, *(with_interval(results, measure) for measure in measures)))
    chances = [chance(measured[0][1], measure) for measure in measures]
    cells = ["" if value is None else f"{value:.2f}" for value in chances]
    table.rows.append(("chance", *cells))
    return table


def write_page(
    out: Path, artifacts: Sequence[Artifact], table: ResultTable, panels: str, rule: str
) -> Path:
    """Write the page with the table, the figures, the rule of the choice and the artifacts."""
    members = ResultTable("Artifacts", ("member", "artifact"), prose=True)
    for number, artifact in enumerate(artifacts, start=1):
        members.rows.append((str(number), artifact.origin))
    path = out / PAGE
    write_report(path, "xray merge", [table.html(), panels, paragraph(rule), members.html()])
    return path


def panels_of(
    measured: Measured, measures: Sequence[str], chosen: Mixture | None, on_line: bool
) -> str:
    """Draw two measures against each other, of two suites if there are, and each over alpha."""
    suites = dict.fromkeys(split_measure(measure)[0] for measure in measures)
    firsts = [next(m for m in measures if split_measure(m)[0] == suite) for suite in suites]
    pair = [*firsts, *(m for m in measures if m not in firsts)][:2]
    drawn = []
    if len(pair) == 2:
        text = f"{title(pair[0])} against {title(pair[1])}, one point per mixture"
        drawn.append(svg(_against(measured, pair, chosen, on_line), text))
    if on_line and len(measured) > 1:
        drawn += [svg(_over_alpha(measured, m, chosen), f"{title(m)} over alpha") for m in measures]
    if not drawn:
        return ""
    what = "alpha" if on_line else "the members of the soup"
    caption = f"Bars are 95 % intervals; the numbers are {what}. The chosen mixture is orange."
    return gallery("Curves", drawn) + paragraph(caption)


def _against(measured: Measured, pair: Sequence[str], chosen: Mixture | None, on_line: bool) -> Any:
    """Draw the second measure over the first, with both intervals."""
    figure, (axis,) = subplots(1, (4.4, 3.4))
    points = [[value_and_ends(results, measure) for measure in pair] for _, results in measured]
    if on_line:
        axis.plot([x[0] for x, _ in points], [y[0] for _, y in points], color=COLOR, lw=1)
    for (mixture, _), (x, y) in zip(measured, points, strict=True):
        color = CHOSEN if mixture == chosen else COLOR
        axis.errorbar(x[0], y[0], _bars(y), _bars(x), "o", color=color, ms=4, lw=0.8, capsize=2)
        axis.annotate(
            mixture.name, (x[0], y[0]), textcoords="offset points", xytext=(4, 4), fontsize=7
        )
    label_axis(axis, *map(title, pair))
    axis.grid(alpha=0.25)
    return figure


def _over_alpha(measured: Measured, measure: str, chosen: Mixture | None) -> Any:
    """Draw a measure with its intervals over alpha."""
    figure, (axis,) = subplots(1, (4.4, 3.4))
    alphas = [float(mixture.name) for mixture, _ in measured]
    points = [value_and_ends(results, measure) for _, results in measured]
    axis.plot(alphas, [point[0] for point in points], color=COLOR, lw=1)
    for (mixture, _), alpha, point in zip(measured, alphas, points, strict=True):
        color = CHOSEN if mixture == chosen else COLOR
        axis.errorbar(alpha, point[0], _bars(point), fmt="o", color=color, ms=4, lw=0.8, capsize=2)
    label_axis(axis, "alpha", title(measure))
    axis.grid(alpha=0.25)
    return figure


def _bars(point: tuple[float, float, float]) -> list[list[float]]:
    """Return the lengths of the lower and the upper error bar of one point."""
    value, low, high = point
    return [[max(0.0, value - low)], [max(0.0, high - value)]]
