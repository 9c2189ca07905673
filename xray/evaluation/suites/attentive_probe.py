"""Attentive probe: one query that attends to frozen patch tokens (V-JEPA, 2404.08471)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xray.errors import ConfigError
from xray.evaluation.suite import LabelledConfig, Measures, probe_suite
from xray.evaluation.suites.knn import KNN

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets


@dataclass
class AttentiveProbeConfig(LabelledConfig):
    """Settings of the probe's training; the defaults are V-JEPA's."""

    epochs: int = 20  # passes over the training samples
    batch_size: int = 64  # samples per step
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.01  # AdamW's
    seed: int = 0  # of initial weights and sample order

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"{key}: epochs and batch_size must be at least 1")


def _run(sets: Sets, config: AttentiveProbeConfig) -> Measures:
    from xray.evaluation.attentive_probe import attentive_probe

    return attentive_probe(sets, config)


ATTENTIVE_PROBE = probe_suite(
    "attentive_probe", AttentiveProbeConfig, _run, "attentive probe",
    compared=("top1",), sets_from=KNN,
)  # fmt: skip
