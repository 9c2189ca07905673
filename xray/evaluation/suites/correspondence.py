"""Correspondence of patches: masks predicted from the nearest training patches (2306.01667)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xray.errors import ConfigError
from xray.evaluation.suite import MaskedConfig, Measures
from xray.evaluation.suites.segmentation import SEGMENTATION, mask_suite

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets


@dataclass
class CorrespondenceConfig(MaskedConfig):
    """Number of neighbours, the temperature of their votes, and the patches to search."""

    k: int = 30  # number of nearest training patches that vote
    temperature: float = 0.02  # a vote weighs exp(cosine / temperature)
    memory: int = 100_000  # training patches to search; of more, so many are drawn
    seed: int = 0  # of that draw

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.k < 1 or self.temperature <= 0 or self.memory < self.k:
            raise ConfigError(
                f"{key}: k must be at least 1, temperature above 0, and memory at least k"
            )


def _run(sets: Sets, config: CorrespondenceConfig) -> Measures:
    from xray.evaluation.correspondence import correspondence

    return correspondence(sets, config)


CORRESPONDENCE = mask_suite(
    "correspondence", CorrespondenceConfig, _run, "patch kNN", sets_from=SEGMENTATION
)
