"""Table of several models' results on the same data: measures as rows, models as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xray.evaluation.suite import Measures, Row
from xray.evaluation.suites import SUITES
from xray.reports.tables import ResultTable


def comparison_table(results: Mapping[str, Mapping[str, Measures]]) -> ResultTable:
    """Make the table: each measure with its 95 % interval for every model, beside chance.

    results: measures by model and by suite; a model without a suite has an empty cell.
    """
    table = ResultTable("Results % [95 % CI]", ("measure", *results, "chance %"))
    for suite in sorted(SUITES, key=lambda suite: bool(suite.reads)):
        rows: dict[str, dict[str, Row]] = {}
        for model, measures in results.items():
            if suite.name not in measures:
                continue
            for row in suite.rows(measures[suite.name]):
                rows.setdefault(row[0], {})[model] = row
            for note in suite.notes(measures[suite.name]) if suite.notes else ():
                if note not in table.notes:
                    table.notes.append(note)
        for title, cells in rows.items():
            table.rows.append((title, *cells_of(cells, list(results))))
    return table


def cells_of(rows: Mapping[str, Row], models: Sequence[str]) -> list[str]:
    """Return the result of each model, "" for none, and chance.

    Chance of tags depends on the model's vocabulary: if the models have several, all are listed in
    the order of the models.
    """
    chances = [rows[model][2] if model in rows else "-" for model in models]
    there = {rows[model][2] for model in rows}
    values = [rows[model][1] if model in rows else "" for model in models]
    return [*values, " / ".join(chances) if len(there) > 1 else there.pop()]


def notes_of(lines: Mapping[str, Sequence[str]]) -> list[str]:
    """Name the models that a line is about before it; a line of all models has no names.

    lines: those of each model.
    """
    notes = []
    for line in dict.fromkeys(line for own in lines.values() for line in own):
        names = [name for name, own in lines.items() if line in own]
        notes.append(line if len(names) == len(lines) else f"{', '.join(names)}: {line}")
    return notes


def short_names(models: Sequence[str]) -> list[str]:
    """Shorten paths to their last parts that tell them apart, without `artifact`."""
    parts = [model.rstrip("/").removesuffix("/artifact").split("/") for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len({*names}) == len(names):
            return names
    return [f"{number} {model}" for number, model in enumerate(models, 1)]
