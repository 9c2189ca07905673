"""The table of evaluation suites, in the order in which they run."""

from __future__ import annotations

from typing import Any

from xray.errors import ConfigError
from xray.evaluation.attentive_probe import ATTENTIVE_PROBE
from xray.evaluation.captions import CAPTIONS
from xray.evaluation.finetune import FINETUNE
from xray.evaluation.knn import KNN
from xray.evaluation.linear_probe import LINEAR_PROBE
from xray.evaluation.retrieval import RETRIEVAL, VIDEO_RETRIEVAL
from xray.evaluation.robustness import ROBUSTNESS
from xray.evaluation.suite import Suite
from xray.evaluation.tagging import TAGS
from xray.evaluation.zero_shot import ZERO_SHOT

SUITES: tuple[Suite[Any], ...] = (
    ZERO_SHOT,
    RETRIEVAL,
    VIDEO_RETRIEVAL,
    CAPTIONS,
    KNN,
    LINEAR_PROBE,
    ATTENTIVE_PROBE,
    FINETUNE,
    ROBUSTNESS,
    TAGS,
)


def suite_named(name: str) -> Suite[Any]:
    """Find a suite; raises ConfigError for an unknown name."""
    for suite in SUITES:
        if suite.name == name:
            return suite
    names = ", ".join(suite.name for suite in SUITES)
    raise ConfigError(f"unknown suite {name!r}: there are {names}")
