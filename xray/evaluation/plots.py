"""Plots of results: curves over severities and attacks, accuracy against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xray.evaluation.keep_rates import MAIN, Rates, per_second
from xray.evaluation.results_table import ATTACKED, SHIFTS, changes, title_of
from xray.reports.figures import subplots


def plot_robustness(measures: Mapping[str, float], path: Path) -> None:
    """Per head, accuracy over severity by corruption and over eps by attack."""
    found = list(changes(measures))
    panels = []
    for head in dict.fromkeys(key.split("/")[0] for key in measures):
        own = [(c, s, 100 * value) for h, c, s, value in found if h == head]
        corrupted = [row for row in own if row[0] not in SHIFTS + ATTACKED]
        attacked = [row for row in own if row[0] in ATTACKED]
        panels += [
            (f"{head.replace('_', '-')}: {kind}", head, clean, across, rows)
            for kind, clean, across, rows in (
                ("corruptions", "clean", "severity (0 = clean)", corrupted),
                ("attacks", "attacked_clean", "eps of 255 (0 = clean)", attacked),
            )
            if rows
        ]
    if not panels:
        return
    figure, axes = subplots(len(panels), (4.5 * len(panels), 3.6))
    for axis, (title, head, clean, across, rows) in zip(axes, panels, strict=True):
        _curves(axis, rows, 100 * measures[f"{head}/{clean}"], 100 * measures[f"{head}/chance"])
        axis.set(title=title, xlabel=across)
    figure.savefig(path)


def _curves(axis: Any, rows: Sequence[tuple[str, str, float]], clean: float, chance: float) -> None:
    for change in dict.fromkeys(change for change, *_ in rows):
        points = sorted((float(s), value) for c, s, value in rows if c == change)
        label = change.replace("_", " ")
        axis.plot(*zip((0.0, clean), *points, strict=True), marker="o", ms=3, lw=1.2, label=label)
    axis.axhline(chance, color="gray", lw=0.8, ls=":", label="chance")
    axis.set_ylabel("top-1 %")
    axis.set_ylim(0, 105)
    axis.set_xticks([0.0, *sorted({float(strength) for _, strength, _ in rows})])
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)


def plot_keep_rates(found: Rates, path: Path) -> None:
    """Each measure over speed, a point per keep rate with its interval."""
    measures = [key for key in next(iter(found.values())) if key.endswith(MAIN)]
    figure, (axis,) = subplots(1, (7.4, 3.8))
    speeds = [r["samples_per_s"] for r in found.values()]
    for key in measures:
        values = [100 * r[key] for r in found.values()]
        below = [100 * (r[key] - r[f"{key}_low"]) for r in found.values()]
        above = [100 * (r[f"{key}_high"] - r[key]) for r in found.values()]
        label = title_of(*key.split("/", 1))
        axis.errorbar(
            speeds, values, [below, above], marker="o", ms=4, lw=1.2, capsize=2, label=label
        )
        for rate, x, y in zip(found, speeds, values, strict=True):
            axis.annotate(rate, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=7)
    axis.set(xlabel=f"{per_second(found)} of the forward pass", ylabel="%")
    axis.set_title("One artifact at several keep rates", fontsize=10)
    axis.grid(alpha=0.25)
    figure.legend(fontsize=7, loc="outside right upper")  # beside the curves, never on them
    figure.savefig(path)
