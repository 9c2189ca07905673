"""Results of the robustness suite as table rows and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xray.evaluation.suite import Measures, Row, share_row
from xray.reports.figures import subplots

ATTACKS = ("fgsm", "pgd", "square")
SHIFTS = ("resolution", "aspect")
TITLES = {
    "corrupted": "mean of corruptions",
    "attacked_clean": "those attacked, clean",
    "shift": "elsewhere",
}


def changes(measures: Measures) -> Iterator[tuple[str, str, str, float]]:
    """Yield (head, change, strength, accuracy) of every changed data set."""
    for key, value in measures.items():
        parts = key.split("/")
        if len(parts) == 3 and not parts[2].endswith(("_low", "_high")):
            yield parts[0], parts[1], parts[2], value


def robustness_rows(measures: Measures) -> Iterator[Row]:
    """Make the rows of each head; a corruption has one, the mean over its severities."""
    for head in dict.fromkeys(key.split("/")[0] for key in measures):
        prefix = f"{head}/"
        own = {key.removeprefix(prefix).replace("/", " "): v for key, v in measures.items()}
        steps = [(change, strength) for h, change, strength, _ in changes(measures) if h == head]
        for key, over in _listed(own, steps):
            title = TITLES.get(key, key.replace("_", " "))
            title += "/255" if key.startswith(ATTACKS) else ""
            yield share_row(f"{head.replace('_', '-')}, {title}", own, key, own["chance"], over)


def _listed(own: Measures, steps: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the measures of a head that have a row, each with its number of samples."""
    every, some = f"{own['samples']:.0f} samples", f"{own['attacked_samples']:.0f} samples"
    corruptions = dict.fromkeys(c for c, _ in steps if c not in SHIFTS + ATTACKS)
    for key in ("clean", *corruptions, "corrupted"):
        if key in own:
            yield key, every
    for change, strength in steps:
        if change in SHIFTS:
            yield f"{change} {strength}", every
    if "attacked_clean" in own:
        yield "attacked_clean", some
    for change, strength in steps:
        if change in ATTACKS:
            yield f"{change} {strength}", some
    if "shift" in own:
        yield "shift", f"{own['shift_samples']:.0f} samples"


def plot_robustness(measures: Measures, path: Path) -> None:
    """Plot each head's accuracy over the severity of corruptions and the eps of attacks."""
    steps = list(changes(measures))
    panels = []
    for head in dict.fromkeys(key.split("/")[0] for key in measures):
        own = [(c, s, 100 * value) for h, c, s, value in steps if h == head]
        corrupted = [row for row in own if row[0] not in SHIFTS + ATTACKS]
        attacked = [row for row in own if row[0] in ATTACKS]
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
