"""Plots of results: curves over severities and attacks, accuracy against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xray.evaluation.keep_rates import MAIN, Rates
from xray.evaluation.table import ATTACKED, SHIFTS, changes
from xray.figures import subplots


def plot_robustness(measures: Mapping[str, float], path: Path) -> None:
    """Accuracy over severity by corruption, and over eps by attack; a pair of panels per head."""
    found = list(changes(measures))
    heads = list(dict.fromkeys(head for head, *_ in found))
    figure, axes = subplots(2 * len(heads), (9.0 * len(heads), 3.6))
    for number, head in enumerate(heads):
        own = [(c, s, 100 * value) for h, c, s, value in found if h == head]
        name = head.replace("_", "-")
        chance = 100 * measures[f"{head}/chance"]
        corruptions = [row for row in own if row[0] not in SHIFTS + ATTACKED]
        clean = 100 * measures[f"{head}/clean"]
        _curves(axes[2 * number], corruptions, clean, chance)
        axes[2 * number].set(title=f"{name}: corruptions", xlabel="severity (0 = clean)")
        attacked = [row for row in own if row[0] in ATTACKED]
        clean = 100 * measures.get(f"{head}/attacked_clean", 0.0)
        _curves(axes[2 * number + 1], attacked, clean, chance)
        axes[2 * number + 1].set(title=f"{name}: attacks", xlabel="eps of 255 (0 = clean)")
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
    """Each measure over images/s, a point per keep rate with its interval."""
    measures = [key for key in next(iter(found.values())) if key.endswith(MAIN)]
    figure, (axis,) = subplots(1, (6.0, 3.8))
    speeds = [r["images_per_s"] for r in found.values()]
    for key in measures:
        values = [100 * r[key] for r in found.values()]
        below = [100 * (r[key] - r[f"{key}_low"]) for r in found.values()]
        above = [100 * (r[f"{key}_high"] - r[key]) for r in found.values()]
        label = key.replace("/", " ").replace("_", " ")
        axis.errorbar(
            speeds, values, [below, above], marker="o", ms=4, lw=1.2, capsize=2, label=label
        )
        for rate, x, y in zip(found, speeds, values, strict=True):
            axis.annotate(rate, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=7)
    axis.set(xlabel="images/s of the forward pass", ylabel="%")
    axis.set_title("One artifact at several keep rates", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)
    figure.savefig(path)
