"""Token selection: how much of the object in a picture token reduction keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xray.artifacts.offers import VISION
from xray.errors import ConfigError
from xray.evaluation.suite import Measures, Row, Suite, SuiteConfig, share_row, titled

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets


@dataclass
class TokenSelectionConfig(SuiteConfig):
    """Pictures with the box of their object, and the keep rates to measure."""

    required_sets = ("shards",)

    shards: str = ""  # pictures whose json has the box of their object
    # json field of the box: [left, top, right, bottom], as shares of the width and the height
    box: str = "object_box"
    keep_rates: list[float] = field(default_factory=lambda: [0.7, 0.5])  # to measure at

    def validate(self, key: str) -> None:
        if not self.keep_rates or any(not 0 < rate <= 1 for rate in self.keep_rates):
            raise ConfigError(f"{key}.keep_rates={self.keep_rates} must be numbers in (0, 1]")


def _run(sets: Sets, config: TokenSelectionConfig) -> Measures:
    from xray.evaluation.token_selection import measure_selection

    return measure_selection(sets, config)


def _check(sets: Sets, config: TokenSelectionConfig) -> None:
    from xray.evaluation.token_selection import check_boxes

    check_boxes(sets, config)


def _rows(measures: Measures) -> Iterator[Row]:
    over = f"{measures['images']:.0f} pictures"
    for key in measures:
        if f"chance_{key}" in measures:
            title = f"object kept at keep rate {key.partition('@')[2]}"
            yield share_row(title, measures, key, measures[f"chance_{key}"], over)


TOKEN_SELECTION = Suite(
    "token_selection",
    TokenSelectionConfig,
    needs=frozenset({VISION}),
    run=_run,
    rows=_rows,
    title=titled("token selection"),
    check=_check,
    added=True,
)
