"""kNN classification by cosine, votes weighted by exp(similarity / T) (DINO, 2104.14294)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xray.errors import ConfigError
from xray.evaluation.suite import LabelledConfig, Measures, probe_suite

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets


@dataclass
class KnnConfig(LabelledConfig):
    """Number of neighbours, and the temperature of their votes."""

    k: int = 20  # number of nearest training samples that vote
    temperature: float = 0.07  # a vote weighs exp(cosine / temperature)

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.k < 1 or self.temperature <= 0:
            raise ConfigError(f"{key}: k must be at least 1, and temperature above 0")


def _run(sets: Sets, config: KnnConfig) -> Measures:
    from xray.evaluation.knn import knn

    train, test = sets.probe("knn", config)
    settings = config.k, config.temperature
    return knn(train.rows, train.labels, test.rows, test.labels, *settings)


def _check(sets: Sets, config: KnnConfig) -> None:
    from xray.evaluation.knn import check_neighbours

    for train, _ in sets.pairs("knn", config):
        check_neighbours(config.k, len(train))


KNN = probe_suite("knn", KnnConfig, _run, "kNN", compared=("top1",), check=_check)
