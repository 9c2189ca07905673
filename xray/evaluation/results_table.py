"""Results of all suites as one table."""

from __future__ import annotations

from collections.abc import Mapping

from xray.evaluation.rows import Measures
from xray.evaluation.suites import SUITES
from xray.reports.tables import ResultTable


def result_table(results: Mapping[str, Measures]) -> ResultTable:
    """Make the table of results: each measure with its 95 % interval, beside chance, in percent.

    Suites that use other suites' data sets come last.
    """
    table = ResultTable("Results", ("measure", "result % [95 % CI]", "chance %", "over"))
    for suite in sorted(SUITES, key=lambda suite: bool(suite.reads)):
        if results.get(suite.name):
            table.rows += suite.rows(results[suite.name])
    return table


def title_of(section: str, measure: str) -> str:
    """Name a measure of a suite, or a metric of a stage, as reports show it: kNN top1."""
    for suite in SUITES:
        if suite.name == section:
            return suite.title(measure)
    return f"{section} {measure}".replace("_", " ")
