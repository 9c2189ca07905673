"""Retrieval by the language of the captions, and the mean over languages.

Each language is measured alone: its captions, and the images that have one. So its scores are those
of a data set of this language, and do not depend on the other languages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.text.captions import Caption, read_captions
from xray.errors import BadSample, DataError, nearest
from xray.evaluation.confidence import mean_ratio
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import flat_captions
from xray.evaluation.retrieval import KS, Ranking, kinds_of, of_prefixes, stripped_lines
from xray.evaluation.suite import Measures
from xray.evaluation.suites.retrieval import ALL, DIRECTIONS, RetrievalConfig


class Spoken(NamedTuple):
    """The captions [M] of a suite's data set in the languages to measure."""

    source: Source
    texts: list[str]
    owner: Tensor  # [M], the place of each caption's sample among `captioned`
    captioned: list[int]  # numbers [N] of the samples with such captions
    languages: dict[str, Tensor]  # mask [M] of the captions in each
    unknown: int  # captions without a language

    @classmethod
    def open(cls, name: str, sets: Sets, config: RetrievalConfig) -> Spoken:
        """Read the captions; raises as `retrieval_by_language`."""
        key = f"eval.{name}"
        source = config.open(sets, name, "shards")
        every = all_captions(source, config)
        counts = Counter(caption.language for own in every for caption in own)
        unknown = counts.pop("", 0)
        languages = chosen(config.languages, counts, key)
        kept = [[caption for caption in own if caption.language in languages] for own in every]
        texts, owner, captioned = flat_captions(
            [[caption.text for caption in own] for own in kept], f"{key}.shards"
        )
        places = torch.tensor([languages.index(c.language) for own in kept for c in own])
        masks = {language: places == number for number, language in enumerate(languages)}
        for language, mask in masks.items():
            if len(owner[mask].unique()) < 2:
                raise DataError(
                    f"{key}.languages: {language!r} has captions of a single sample, and retrieval "
                    "needs two: name the other languages"
                )
        return cls(source, texts, owner, captioned, masks, unknown)


def retrieval_by_language(name: str, sets: Sets, config: RetrievalConfig) -> Measures:
    """Measure retrieval in each language of `config.languages`, as LANGUAGE/MEASURE.

    R@k without a language is the mean over them. Samples without a caption in these languages are
    left out and counted as `uncaptioned`, captions of unknown language as `without_language`.
    Raises DataError for a language without captions, or with those of a single sample.
    """
    own = Spoken.open(name, sets, config)
    images = sets.features(own.source, "joint").rows[own.captioned]
    rows, kinds = sets.texts(own.texts), kinds_of(own.texts, config.same)

    def part(images: Tensor, rows: Tensor) -> dict[str, float]:
        return by_language(images, rows, own.owner, own.languages, kinds)

    measures = part(images, rows)
    if left_out := len(own.source) - len(own.captioned):
        measures["uncaptioned"] = float(left_out)
    if own.unknown:
        measures["without_language"] = float(own.unknown)
    return measures | of_prefixes(sets, images, rows, part)


def all_captions(source: Source, config: RetrievalConfig) -> list[list[Caption]]:
    """Read the captions of each sample of a suite's data set with their languages."""
    every = [captions_of(source, *place, config.captions) for place in source.places()]
    if not config.lines:
        return every
    return [
        [replace(own, text=line) for own in captions for line in stripped_lines(own.text)]
        for captions in every
    ]


def captions_of(
    source: Source, shard: int, member: int, fields: Mapping[str, float]
) -> list[Caption]:
    """Read the captions of a sample with their languages; [] if it has none that can be read.

    With several caption fields, the name of a field is the language of its captions that have no
    other.
    """
    if len(fields) > 1:
        found = [captions_of(source, shard, member, {name: 1.0}) for name in fields]
        return [
            caption if caption.language else replace(caption, language=name)
            for name, own in zip(fields, found, strict=True)
            for caption in own
        ]
    try:
        return read_captions(source.read(shard, member, TEXT_FILES), fields)
    except BadSample:
        return []


def chosen(asked: Sequence[str], counts: Mapping[str, int], key: str) -> list[str]:
    """Return the languages to measure; raises DataError if one has no captions.

    counts: captions of each language. key: of the suite.
    """
    if not counts:
        raise DataError(
            f"{key}.languages: no caption of {key}.shards has a language: a json field or column "
            "`language`, captions as {en: [...], de: [...]}, or a field for each language in "
            f"{key}.captions"
        )
    if [*asked] == [ALL]:
        return sorted(counts)
    for language in asked:
        if language not in counts:
            there = ", ".join(f"{own} ({counts[own]:,})" for own in sorted(counts))
            raise DataError(
                f"{key}.languages: no caption of {key}.shards is in {language!r}; there are "
                f"{there}{nearest(language, counts)}"
            )
    return [*dict.fromkeys(asked)]


def by_language(
    images: Tensor,
    texts: Tensor,
    owner: Tensor,
    languages: Mapping[str, Tensor],
    kind: Tensor | None = None,
) -> dict[str, float]:
    """Measure retrieval in each language, and the mean R@k over them with its interval.

    images: [N, D]. texts: [M, D]. owner: [M], the image of each text. Features are normalised.
    languages: mask [M] of the texts in each. kind: as in `retrieval`. Intervals of the mean
    resample images, each with its captions in all languages.
    """
    N, L = len(images), len(languages)
    names = [f"{direction}_R@{k}" for k in KS for direction in DIRECTIONS]
    sums = {name: torch.zeros(2, N, L, dtype=torch.float64) for name in names}
    chances = {name: list[float]() for name in names}
    found: dict[str, float] = {
        "images": float(N),
        "texts": float(len(texts)),
        "languages": float(L),
    }
    for column, (language, rows) in enumerate(languages.items()):
        own, places = owner[rows].unique(return_inverse=True)
        kinds = None if kind is None else kind[rows].unique(return_inverse=True)[1]
        ranking = Ranking.of(images[own], texts[rows], places, kinds)
        for k in KS:
            for direction in DIRECTIONS:
                name = f"{direction}_R@{k}"
                hits, weights = ranking.hits(direction, k)
                sums[name][0, own, column], sums[name][1, own, column] = hits, weights.double()
                chances[name].append(ranking.chance(direction, k))
        measures = ranking.measures(KS)
        found |= {f"{language}/{measure}": value for measure, value in measures.items()}
    for name in names:
        found |= mean_ratio(name, *sums[name])
        found[f"chance_{name}"] = sum(chances[name]) / L
    return found
