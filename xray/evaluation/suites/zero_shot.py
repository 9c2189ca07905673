"""Zero-shot classification: cosines of class names' prompts with images (CLIP, 2103.00020)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from xray.artifacts.offers import JOINT
from xray.errors import ConfigError
from xray.evaluation.suite import Measures, Row, Suite, SuiteConfig, share_row, titled
from xray.words import count

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets


@dataclass
class ZeroShotConfig(SuiteConfig):
    """Labelled samples and a file of class names, one per line; "" = the names of the data set."""

    required_sets = ("shards",)
    optional_sets = ("classes",)

    shards: str = ""  # labelled samples: shards, a folder of class folders, or a list
    classes: str = ""  # file of class names, one per line; "" = the names of the data set
    # texts for a class, whose vectors are averaged; {} is the class name
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}"])
    modality: Literal["image", "video"] = "image"  # of the samples

    def validate(self, key: str) -> None:
        super().validate(key)
        if not self.templates or not all("{}" in template for template in self.templates):
            raise ConfigError(f"{key}.templates: each needs {{}} where the class name goes")


def _run(sets: Sets, config: ZeroShotConfig) -> Measures:
    from xray.evaluation.zero_shot import NamedClasses, zero_shot

    classes = NamedClasses.open(sets)
    features = sets.features(classes.source, "joint")
    labels = classes.number(features.labels, classes.source)
    return zero_shot(features.rows, labels, classes.weights(sets))


def _rows(measures: Measures) -> Iterator[Row]:
    samples = count(measures["samples"], "sample")
    over = f"{samples}, {count(measures['classes'], 'class', 'classes')}"
    for key in ("top1", "top5"):
        yield share_row(f"zero-shot {key}", measures, key, measures[f"chance_{key}"], over)


ZERO_SHOT = Suite(
    "zero_shot",
    ZeroShotConfig,
    needs=frozenset({JOINT}),
    run=_run,
    rows=_rows,
    title=titled("zero-shot"),
    compared=("top1",),
)
