"""Retrieval: of images and videos by captions and back (R@k, median rank), and among captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from xray.artifacts.offers import JOINT, SENTENCES
from xray.evaluation.suite import (
    CaptionedConfig,
    Measures,
    Row,
    Suite,
    rank_row,
    share_row,
    titled,
)
from xray.words import count

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets

DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass
class RetrievalConfig(CaptionedConfig):
    """Images with captions."""

    # correct for a caption: only its own sample, or every sample that has the same caption
    same: Literal["sample", "caption"] = "sample"


@dataclass
class VideoRetrievalConfig(RetrievalConfig):
    """Videos with captions."""

    modality: Literal["image", "video", "text"] = "video"  # of the samples
    # correct for a caption: only its own sample, or every sample that has the same caption
    same: Literal["sample", "caption"] = "caption"


def _run(name: str, sets: Sets, config: RetrievalConfig) -> Measures:
    from xray.evaluation.retrieval import retrieval_of

    return retrieval_of(name, sets, config)


def _title(medium: str, measure: str) -> str:
    """Name a measure, such as: text to clip R@5, first 64 features."""
    name, slash, prefix = measure.partition("/")
    direction = name.replace("image", medium).replace("_", " ")
    return direction + (f", first {prefix} features" if slash else "")


def _rows(medium: str, noun: str, measures: Measures) -> Iterator[Row]:
    over = f"{count(measures['images'], noun)}, {count(measures['texts'], 'caption')}"
    if "uncaptioned" in measures:
        over += f"; {measures['uncaptioned']:,.0f} without, left out"
    recalls = [name for name in measures if name.startswith(DIRECTIONS)]
    prefixes = dict.fromkeys(name.partition("/")[2] for name in recalls)
    for prefix, direction in product(prefixes, DIRECTIONS):
        for measure in ("R@1", "R@5", "R@10", "median_rank"):
            name = f"{direction}_{measure}"
            key = f"{name}/{prefix}" if prefix else name
            if key in measures:
                row = rank_row if measure == "median_rank" else share_row
                yield row(_title(medium, key), measures, key, measures[f"chance_{name}"], over)


def _suite(name: str, config: type[RetrievalConfig], medium: str, noun: str) -> Suite[Any]:
    return Suite(
        name,
        config,
        needs=frozenset({JOINT}),
        run=partial(_run, name),
        rows=partial(_rows, medium, noun),
        title=partial(_title, medium),
        compared=tuple(f"{direction}_R@1" for direction in DIRECTIONS),
    )


RETRIEVAL = _suite("retrieval", RetrievalConfig, "image", "picture")
VIDEO_RETRIEVAL = _suite("video_retrieval", VideoRetrievalConfig, "clip", "clip")


def _run_captions(sets: Sets, config: CaptionedConfig) -> Measures:
    from xray.evaluation.retrieval import captions_of_tower

    return captions_of_tower(sets, config)


def _rows_captions(measures: Measures) -> Iterator[Row]:
    title, over = "caption to caption top1", count(measures["captions"], "caption")
    chance = measures["chance_top1"]
    if "before_top1" in measures:
        yield share_row(f"{title}, before tuning", measures, "before_top1", chance, over)
    yield share_row(title, measures, "top1", chance, over)


CAPTIONS = Suite(
    "captions",
    CaptionedConfig,
    needs=frozenset({SENTENCES}),
    run=_run_captions,
    rows=_rows_captions,
    title=titled("caption to caption"),
)
