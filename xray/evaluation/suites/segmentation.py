"""Linear segmentation probe on frozen patch tokens (DINOv2, 2304.07193)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xray.artifacts.offers import VISION
from xray.errors import ConfigError
from xray.evaluation.suite import C, MaskedConfig, Measures, Row, Suite, share_row, titled
from xray.words import count

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets


@dataclass
class SegmentationConfig(MaskedConfig):
    """Settings of the training of the linear layer."""

    steps: int = 2000  # of the training; DINOv2 makes 40,000, at lr 1e-3
    batch_size: int = 16  # pictures per step
    lr: float = 1e-2  # peak learning rate, then half a cosine
    weight_decay: float = 1e-4  # AdamW's
    seed: int = 0  # of initial weights and sample order

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.steps < 1 or self.batch_size < 1:
            raise ConfigError(f"{key}: steps and batch_size must be at least 1")


def mask_suite(
    name: str, config: type[C], run: Callable[[Sets, C], Measures], label: str, **more: object
) -> Suite[C]:
    """Make a suite that predicts masks from patch tokens and needs only a backbone."""

    def rows(measures: Measures) -> Iterator[Row]:
        classes = count(measures["classes"], "class", "classes")
        over = f"{count(measures['pictures'], 'picture')}, {classes}"
        for key in ("mIoU", "pixel_accuracy"):
            title = f"{label} {key}".replace("_", " ")
            yield share_row(title, measures, key, measures[f"chance_{key}"], over)

    return Suite(
        name, config, frozenset({VISION}), run, rows, titled(label),
        compared=("mIoU",), added=True, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def _run(sets: Sets, config: SegmentationConfig) -> Measures:
    from xray.evaluation.segmentation import segmentation

    return segmentation(sets, config)


SEGMENTATION = mask_suite("segmentation", SegmentationConfig, _run, "segmentation")
