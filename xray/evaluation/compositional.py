"""Compositional understanding: right captions against wrong ones that differ in few words.

A caption is right if it is nearer to its picture than the wrong ones, as in SugarCrepe (2306.14610)
and ARO (2210.01936). Winoground (2204.03162) has two pictures and two captions with the same words.
A tie is no success, as in these papers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data_pipelines.ingest.caption_pairs import QuestionFiles
from xray.evaluation.confidence import share
from xray.evaluation.datasets import Sets
from xray.evaluation.suite import Measures
from xray.evaluation.suites.compositional import COMPOSITIONAL, CompositionalConfig
from xray.evaluation.zero_shot import HELD

# Score of random similarities: of the 4! orders of four, 6 have the right text scores, 6 the right
# image scores, and 4 both.
CHANCES = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}


def compositional(sets: Sets, config: CompositionalConfig) -> Measures:
    """Measure accuracy on pairs, or the text, image and group score of rows of two by two.

    Measures of a category end in /CATEGORY. Intervals resample pictures with all their pairs, or
    rows of two by two.
    """
    source = config.open(sets, COMPOSITIONAL.name, "pairs")
    assert isinstance(source, QuestionFiles)
    questions = source.questions
    texts = {text: None for own in questions for text in own.captions}
    numbers = {text: number for number, text in enumerate(texts)}
    captions = [[numbers[text] for text in own.captions] for own in questions]
    pictures = torch.tensor([own.pictures for own in questions])
    images, rows = sets.features(source, "joint").rows, sets.texts([*texts])
    if source.two_by_two:
        hits = two_by_two_hits(images, rows, pictures, torch.tensor(captions))
        chances = {name: torch.full((len(questions),), chance) for name, chance in CHANCES.items()}
        unit = torch.arange(len(questions))
    else:
        hits = {"accuracy": pair_hits(images, rows, pictures[:, 0], captions)}
        chances = {"accuracy": torch.tensor([1 / len(own) for own in captions])}
        unit = pictures[:, 0]
    measures = _shares(hits, chances, unit, "")
    for category in sorted({own.category for own in questions} - {""}):
        of = torch.tensor([own.category == category for own in questions])
        own_hits, own_chances = (
            {name: every[of] for name, every in both.items()} for both in (hits, chances)
        )
        measures |= _shares(own_hits, own_chances, unit[of], f"/{category}")
    return measures


def pair_hits(
    images: Tensor, texts: Tensor, picture: Tensor, captions: Sequence[Sequence[int]]
) -> Tensor:
    """Return which right captions are nearer to their picture than all wrong ones, [Q].

    images: [N, D]. texts: [M, D]. Features are normalised. picture: [Q]. captions: the right
    caption of each question, then wrong ones.
    """
    right = torch.tensor([own[0] for own in captions])
    wrong = torch.tensor([text for own in captions for text in own[1:]])
    question = torch.tensor([n for n, own in enumerate(captions) for _ in own[1:]])
    others = _cosines(images, texts, picture[question], wrong)
    nearest = torch.full((len(captions),), -torch.inf).scatter_reduce(0, question, others, "amax")
    return _cosines(images, texts, picture, right) > nearest


def two_by_two_hits(
    images: Tensor, texts: Tensor, pictures: Tensor, captions: Tensor
) -> dict[str, Tensor]:
    """Return the text, image and group hits, [Q] each, of pictures [Q, 2] and captions [Q, 2].

    Text: each picture's caption is the nearer one. Image: each caption's picture is. Group: both.
    """
    same = [_cosines(images, texts, pictures[:, i], captions[:, i]) for i in (0, 1)]
    cross = [_cosines(images, texts, pictures[:, i], captions[:, 1 - i]) for i in (0, 1)]
    text = (same[0] > cross[0]) & (same[1] > cross[1])
    image = (same[0] > cross[1]) & (same[1] > cross[0])
    return {"text_score": text, "image_score": image, "group_score": text & image}


def _cosines(images: Tensor, texts: Tensor, picture: Tensor, text: Tensor) -> Tensor:
    """Return the cosines of pairs of rows, [Q]."""
    rows = max(1, HELD // images.shape[1])
    pairs = zip(picture.split(rows), text.split(rows), strict=True)
    return torch.cat([(images[own] * texts[other]).sum(dim=1) for own, other in pairs])


def _shares(
    hits: Mapping[str, Tensor], chances: Mapping[str, Tensor], unit: Tensor, ending: str
) -> dict[str, float]:
    """Return the share of each kind of hit, its interval and chance, with an ending of the names.

    unit: [Q], what is resampled with all its questions.
    """
    units = unit.unique(return_inverse=True)[1]
    found = {"samples": float(len(unit))}
    for name, own in hits.items():
        found |= share(name, torch.bincount(units, own.double()), torch.bincount(units))
        found[f"chance_{name}"] = float(chances[name].double().mean())
    return {f"{name}{ending}": value for name, value in found.items()}
