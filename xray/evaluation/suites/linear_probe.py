"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from xray.evaluation.suite import LabelledConfig, Measures, probe_suite
from xray.evaluation.suites.knn import KNN

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets


@dataclass
class LinearProbeConfig(LabelledConfig):
    """The solver of the logistic regression."""

    # lbfgs: L2 chosen on held-out training samples; sgd: LLM2CLIP's recipe; mae: MAE's recipe
    solver: Literal["lbfgs", "sgd", "mae"] = "lbfgs"


def _run(sets: Sets, config: LinearProbeConfig) -> Measures:
    from xray.evaluation.linear_probe import linear_probe

    train, test = sets.probe("linear_probe", config)
    return linear_probe(train.views, train.labels, test.views, test.labels, config.solver)


LINEAR_PROBE = probe_suite(
    "linear_probe", LinearProbeConfig, _run, "linear probe", compared=("top1",), sets_from=KNN
)
