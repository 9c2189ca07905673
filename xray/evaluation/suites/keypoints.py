"""Keypoint correspondence: the nearest patch of another picture (SPair-71k, 1908.10543)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from xray.artifacts.offers import VISION
from xray.errors import ConfigError
from xray.evaluation.suite import Measures, Row, Suite, SuiteConfig, share_row, titled
from xray.words import count

if TYPE_CHECKING:
    from data_pipelines.shards.source import Source
    from xray.evaluation.datasets import Sets


@dataclass
class KeypointsConfig(SuiteConfig):
    """Pairs of pictures with keypoints, and when a match counts as correct."""

    required_sets = ("pairs",)
    modality: ClassVar[Literal["image"]] = "image"

    # table with a row per keypoint: source, target (pictures), source_x, source_y, target_x,
    # target_y (pixels) and optionally size (pixels; default: the larger side of the target)
    pairs: str = ""
    alpha: float = 0.1  # a match is correct within alpha * size of the target's keypoint

    def open(self, sets: Sets, key: str, name: str) -> Source:
        from data_pipelines.ingest.keypoints import open_pairs

        return open_pairs(f"eval.{key}.{name}", self.pairs, sets.data.root).source

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.alpha <= 0:
            raise ConfigError(f"{key}.alpha={self.alpha} must be above 0")


def _run(sets: Sets, config: KeypointsConfig) -> Measures:
    from xray.evaluation.keypoints import match_keypoints

    return match_keypoints(sets, config)


def _rows(measures: Measures) -> Iterator[Row]:
    over = f"{count(measures['keypoints'], 'keypoint')} in {count(measures['pairs'], 'pair')}"
    if measures["left_out"]:
        over += f"; {measures['left_out']:,.0f} outside of the view, left out"
    title = f"keypoints PCK@{measures['alpha']:g}"
    yield share_row(title, measures, "PCK", measures["chance_PCK"], over)


KEYPOINTS = Suite(
    "keypoints",
    KeypointsConfig,
    needs=frozenset({VISION}),
    run=_run,
    rows=_rows,
    title=titled("keypoints"),
    compared=("PCK",),
    added=True,
)
