"""Retrieval: of images and videos by captions and back (R@k, median rank), and among captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from xray.artifacts.offers import JOINT, SENTENCES
from xray.config.identity import added
from xray.errors import ConfigError
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
ALL = "all"  # languages


@dataclass
class RetrievalConfig(CaptionedConfig):
    """Images with captions."""

    # correct for a caption: only its own sample, or every sample that has the same caption
    same: Literal["sample", "caption"] = "sample"
    lines: bool = added(False)  # each line of a caption is one, as in CLIP_benchmark's txt files
    # languages to measure one by one, and their mean: [en, de], or [all]; [] = all captions at once
    languages: list[str] = added(factory=list)

    def validate(self, key: str) -> None:
        super().validate(key)
        if ALL in self.languages and len(self.languages) > 1:
            raise ConfigError(f"{key}.languages={self.languages}: give [{ALL}], or names")
        if "False" in self.languages:
            raise ConfigError(f"{key}.languages: yaml reads no as false: write 'no' in quotes")


@dataclass
class VideoRetrievalConfig(RetrievalConfig):
    """Videos with captions."""

    modality: Literal["image", "video", "text"] = "video"  # of the samples
    # correct for a caption: only its own sample, or every sample that has the same caption
    same: Literal["sample", "caption"] = "caption"


def _run(name: str, sets: Sets, config: RetrievalConfig) -> Measures:
    if config.languages:
        from xray.evaluation.languages import retrieval_by_language

        return retrieval_by_language(name, sets, config)
    from xray.evaluation.retrieval import retrieval_of

    return retrieval_of(name, sets, config)


def _check(name: str, sets: Sets, config: RetrievalConfig) -> None:
    if config.languages:
        from xray.evaluation.languages import Spoken

        Spoken.open(name, sets, config)
        return
    from xray.evaluation.retrieval import captioned_of

    captioned_of(name, sets, config)


def _title(medium: str, measure: str) -> str:
    """Name a measure, such as: text to clip R@5, first 64 features; text to image R@1, en."""
    first, slash, rest = measure.rpartition("/")
    language = slash and not first.startswith(DIRECTIONS)
    direction = (rest if language or not slash else first).replace("_", " ")
    more = first if language else f"first {rest} features" if slash else ""
    return direction.replace("image", medium) + (f", {more}" if more else "")


def _rows(medium: str, noun: str, measures: Measures) -> Iterator[Row]:
    over = _over(noun, measures)
    recalls = [name for name in measures if name.startswith(DIRECTIONS)]
    prefixes = dict.fromkeys(name.partition("/")[2] for name in recalls)
    mean = ", mean" if "languages" in measures else ""
    for prefix, direction in product(prefixes, DIRECTIONS):
        for measure in ("R@1", "R@5", "R@10", "median_rank"):
            name = f"{direction}_{measure}"
            key = f"{name}/{prefix}" if prefix else name
            if key in measures:
                row = rank_row if measure == "median_rank" else share_row
                title = _title(medium, key) + mean
                yield row(title, measures, key, measures[f"chance_{name}"], over)
    for language in [key.removesuffix("/images") for key in measures if key.endswith("/images")]:
        yield from _language_rows(medium, noun, language, measures)


def _language_rows(medium: str, noun: str, language: str, measures: Measures) -> Iterator[Row]:
    """Make the rows of one language, whose measures are LANGUAGE/MEASURE."""
    prefix = f"{language}/"
    own = {key.removeprefix(prefix): measures[key] for key in measures if key.startswith(prefix)}
    for direction in DIRECTIONS:
        for key in (f"{direction}_R@{k}" for k in (1, 5, 10)):
            title = _title(medium, f"{prefix}{key}")
            yield share_row(title, own, key, own[f"chance_{key}"], _over(noun, own))


def _over(noun: str, measures: Measures) -> str:
    """Describe the samples and captions of a result, and those that were left out."""
    sizes = {"languages": "language", "images": noun, "texts": "caption"}
    over = ", ".join(count(measures[key], sizes[key]) for key in sizes if key in measures)
    if "uncaptioned" in measures:
        over += f"; {measures['uncaptioned']:,.0f} without, left out"
    if "without_language" in measures:
        captions = count(measures["without_language"], "caption")
        over += f"; {captions} of unknown language, left out"
    return over


def _suite(name: str, config: type[RetrievalConfig], medium: str, noun: str) -> Suite[Any]:
    return Suite(
        name,
        config,
        needs=frozenset({JOINT}),
        run=partial(_run, name),
        rows=partial(_rows, medium, noun),
        title=partial(_title, medium),
        compared=tuple(f"{direction}_R@1" for direction in DIRECTIONS),
        check=partial(_check, name),
    )


RETRIEVAL = _suite("retrieval", RetrievalConfig, "image", "picture")
VIDEO_RETRIEVAL = _suite("video_retrieval", VideoRetrievalConfig, "clip", "clip")


def _run_captions(sets: Sets, config: CaptionedConfig) -> Measures:
    from xray.evaluation.retrieval import captions_of_tower

    return captions_of_tower(sets, config)


def _check_captions(sets: Sets, config: CaptionedConfig) -> None:
    from xray.evaluation.retrieval import grouped_captions

    grouped_captions(sets, config)


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
    check=_check_captions,
)
