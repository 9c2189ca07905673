"""Supervised fine-tuning of the backbone on labels, by MAE's recipe (2111.06377)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xray.config.identity import added
from xray.errors import ConfigError
from xray.evaluation.suite import LabelledConfig, Measures, probe_suite
from xray.evaluation.suites.knn import KNN

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets


@dataclass
class FinetuneConfig(LabelledConfig):
    """MAE's settings for a ViT-B, with smaller batches, half the epochs and half the peak lr."""

    shots: int = added(0)  # training samples per class, drawn at random; 0 = all
    epochs: int = 50  # passes over the training samples
    batch_size: int = 32  # samples per step
    base_lr: float = 8e-3  # peak learning rate per 256 samples of a step
    weight_decay: float = 0.05  # AdamW's
    layer_decay: float = 0.65  # factor of the learning rate per block, from the top down
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    drop_path: float = 0.1  # stochastic depth: probability in the last block
    smoothing: float = 0.1  # label smoothing
    # smallest and largest area of the random crop, as a share of the picture
    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])
    flip: bool = True  # horizontal flip
    rand_augment: list[int] = field(default_factory=lambda: [0, 9])  # operations, magnitude <= 30
    mixup: float = 0.0  # a of the Beta(a, a) that blends two images; 0 = off
    cutmix: float = 0.0  # a of the Beta(a, a) of the area from another image; 0 = off
    # of the drawn samples, the head's initial weights, the order of samples and the augmentation
    seed: int = 0

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.shots < 0:
            raise ConfigError(f"{key}.shots={self.shots} must be at least 0")
        if self.epochs < 1 or self.batch_size < 2:
            raise ConfigError(f"{key}: epochs must be at least 1 and batch_size at least 2")
        if len(self.crop_scale) != 2 or not 0 < min(self.crop_scale) <= max(self.crop_scale) <= 1:
            raise ConfigError(f"{key}.crop_scale must be [smallest, largest] in (0, 1]")
        if len(self.rand_augment) != 2 or min(self.rand_augment) < 0:
            raise ConfigError(f"{key}.rand_augment must be [operations, magnitude]")


def _run(sets: Sets, config: FinetuneConfig) -> Measures:
    from xray.evaluation.finetune import finetune

    return finetune(sets, config)


def _check(sets: Sets, config: FinetuneConfig) -> None:
    from xray.evaluation.few_shot import check_shots

    if config.shots:
        check_shots(sets, "finetune", config, config.shots)


FINETUNE = probe_suite("finetune", FinetuneConfig, _run, "fine-tuning", sets_from=KNN, check=_check)
