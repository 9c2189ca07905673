"""Evaluation of a tag head on samples with tags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Literal

from data_pipelines.tags.reader import Origin
from xray.artifacts import offers
from xray.errors import ConfigError
from xray.evaluation.suite import Measures, Row, Suite, SuiteConfig, share_row, titled
from xray.words import count

if TYPE_CHECKING:
    from data_pipelines.shards.source import Source
    from xray.evaluation.datasets import Sets


@dataclass
class TaggingConfig(SuiteConfig):
    """Samples with tags, and the views that their probabilities are averaged over."""

    required_sets = ("shards",)

    shards: str = ""  # samples with tags: shards, a folder or a list
    modality: Literal["image", "video"] = "image"  # of the samples
    tags: Origin = "hashtags"  # origin of a sample's tags, as in data.sources
    field: str = "hashtags"  # json field of the tags
    # json fields of the captions that tags are read from, and their weights
    captions: dict[str, float] = dataclass_field(default_factory=dict)
    clips: int = 1  # times per video
    crops: int = 1  # squares per image or frame: 1 or 3

    def validate(self, key: str) -> None:
        if not self.shards:
            raise ConfigError(f"{key}.shards is not set")
        if self.clips < 1 or self.crops not in (1, 3):
            raise ConfigError(f"{key}.clips must be at least 1, and {key}.crops 1 or 3")

    def open(self, sets: Sets, key: str, name: str) -> Source:
        """Open the samples; a list may have the column of its tags only."""
        columns = (*self.captions, self.field) if self.tags == "hashtags" else self.captions
        return sets.open(key, self.shards, self.modality, columns)


def _run(sets: Sets, config: dict[str, TaggingConfig]) -> Measures:
    from xray.evaluation.tagging import taggings

    return taggings(sets, config)


def _check(sets: Sets, config: dict[str, TaggingConfig]) -> None:
    from xray.evaluation.tagging import check_tags

    check_tags(sets, config)


def _rows(measures: Measures) -> Iterator[Row]:
    for name in dict.fromkeys(key.split("/")[0] for key in measures):
        prefix = f"{name}/"
        r = {k.removeprefix(prefix): v for k, v in measures.items() if k.startswith(prefix)}
        samples, size = r["samples"] + r["untagged"], r["vocabulary"]
        over = f"{r['samples']:,.0f} of {count(samples, 'sample')}, {count(r['tags'], 'tag')}"
        for measure in ("precision@1", "recall@5"):
            yield share_row(f"{name} {measure}", r, measure, r[f"chance_{measure}"], over)
        for measure in [m for m in r if m == "mAP" or m.startswith("mAP[")]:
            tags = count(r[measure.replace("mAP", "mAP_tags")], "tag")
            yield share_row(f"{name} {measure}", r, measure, r[f"random_{measure}"], tags)
        least = r["least_dead@10"] / size
        yield share_row(f"{name} dead tags", r, "dead_share@10", least, count(size, "tag"))
        yield f"{name} calibration error", f"{100 * r['ece']:.1f}", "", over


TAGS = Suite(
    "tags",
    dict[str, TaggingConfig],
    needs=frozenset({offers.TAGS}),
    run=_run,
    rows=_rows,
    title=titled("tags"),
    check=_check,
)
