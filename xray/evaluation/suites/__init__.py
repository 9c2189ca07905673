"""All evaluation suites, in the order in which they run, and the table of their results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xray.errors import ConfigError, nearest
from xray.evaluation.suite import Measures, Row, Suite
from xray.evaluation.suites.attentive_probe import ATTENTIVE_PROBE
from xray.evaluation.suites.compositional import COMPOSITIONAL
from xray.evaluation.suites.compression import COMPRESSION
from xray.evaluation.suites.correspondence import CORRESPONDENCE
from xray.evaluation.suites.few_shot import FEW_SHOT
from xray.evaluation.suites.finetune import FINETUNE
from xray.evaluation.suites.keypoints import KEYPOINTS
from xray.evaluation.suites.knn import KNN
from xray.evaluation.suites.linear_probe import LINEAR_PROBE
from xray.evaluation.suites.retrieval import CAPTIONS, RETRIEVAL, VIDEO_RETRIEVAL
from xray.evaluation.suites.robustness import ROBUSTNESS
from xray.evaluation.suites.segmentation import SEGMENTATION
from xray.evaluation.suites.tagging import TAGS
from xray.evaluation.suites.token_selection import TOKEN_SELECTION
from xray.evaluation.suites.zero_shot import ZERO_SHOT
from xray.reports.tables import ResultTable

SUITES: tuple[Suite[Any], ...] = (
    ZERO_SHOT,
    RETRIEVAL,
    VIDEO_RETRIEVAL,
    COMPRESSION,
    CAPTIONS,
    COMPOSITIONAL,
    KNN,
    LINEAR_PROBE,
    FEW_SHOT,
    ATTENTIVE_PROBE,
    FINETUNE,
    SEGMENTATION,
    CORRESPONDENCE,
    KEYPOINTS,
    ROBUSTNESS,
    TAGS,
    TOKEN_SELECTION,
)


def suite_named(name: str) -> Suite[Any]:
    """Find a suite; raises ConfigError for an unknown name."""
    for suite in SUITES:
        if suite.name == name:
            return suite
    names = [suite.name for suite in SUITES]
    raise ConfigError(f"unknown suite {name!r}: there are {', '.join(names)}{nearest(name, names)}")


def result_table(results: Mapping[str, Measures]) -> ResultTable:
    """Make the table of results: each measure with its 95 % interval, beside chance, in percent.

    Suites that use other suites' data sets come last. The notes say which samples were trained on.
    """
    from xray.evaluation.overlap import OVERLAP, overlap_lines  # imports torch

    table = ResultTable("Results", ("measure", "result % [95 % CI]", "chance %", "over"))
    for suite in sorted(SUITES, key=lambda suite: bool(suite.reads)):
        if results.get(suite.name):
            table.rows += rows_of(suite, results[suite.name])
            table.notes += suite.notes(results[suite.name]) if suite.notes else ()
    table.notes += overlap_lines(results.get(OVERLAP, {}))
    return table


def rows_of(suite: Suite[Any], measures: Measures) -> Iterator[Row]:
    """Make a suite's rows; those of data with several splits say which ones they are of."""
    note = ""
    if "splits" in measures:
        note = f", mean of {measures['splits']:.0f} splits"
    elif "split" in measures:
        note = f", split {measures['split']:.0f}"
    for title, value, chance, over in suite.rows(measures):
        yield title, value, chance, over + note


def title_of(section: str, measure: str) -> str:
    """Name a measure of a suite, or a metric of a stage, as reports show it: kNN top1."""
    for suite in SUITES:
        if suite.name == section:
            return suite.title(measure)
    return f"{section} {measure}".replace("_", " ")
