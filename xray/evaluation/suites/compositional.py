"""Compositional understanding: right captions against wrong ones that differ in few words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xray.artifacts.offers import JOINT
from xray.evaluation.suite import Measures, Row, Suite, SuiteConfig, share_row
from xray.words import count

if TYPE_CHECKING:
    from data_pipelines.shards.source import Source
    from xray.evaluation.datasets import Sets


@dataclass
class CompositionalConfig(SuiteConfig):
    """A table of pictures with a right and a wrong caption, or of two pictures and two captions."""

    required_sets = ("pairs",)

    # table with a picture, `caption` and `negative_caption` in each row (SugarCrepe, ARO), or with
    # `image_0`, `image_1`, `caption_0` and `caption_1` (Winoground)
    pairs: str = ""
    category: str = "category"  # column of the table whose values are measured one by one, too

    def open(self, sets: Sets, key: str, name: str) -> Source:
        from data_pipelines.ingest.caption_pairs import open_questions

        opened = f"eval.{key}.{name}", self.pairs, sets.data.root, self.category
        return sets.once((key, self.pairs, self.category), lambda: open_questions(*opened))


def _run(sets: Sets, config: CompositionalConfig) -> Measures:
    from xray.evaluation.compositional import compositional

    return compositional(sets, config)


def _title(measure: str) -> str:
    name, slash, category = measure.partition("/")
    return f"compositional {name}".replace("_", " ") + (f", {category}" if slash else "")


def _rows(measures: Measures) -> Iterator[Row]:
    for key in [name.removeprefix("chance_") for name in measures if name.startswith("chance_")]:
        _, slash, category = key.partition("/")
        over = count(measures[f"samples{slash}{category}"], "row")
        yield share_row(_title(key), measures, key, measures[f"chance_{key}"], over)


COMPOSITIONAL = Suite(
    "compositional",
    CompositionalConfig,
    needs=frozenset({JOINT}),
    run=_run,
    rows=_rows,
    title=_title,
    added=True,
)
