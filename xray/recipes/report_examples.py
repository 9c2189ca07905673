"""Examples of a run's models on real samples: tags, retrieved images, confused classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Source
from data_pipelines.tags.vocabulary import Vocabulary
from data_pipelines.text.captions import captions_of
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import Encoder, Tagger
from xray.config import DataConfig
from xray.config.schedule import value_at
from xray.errors import BadSample
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import label_of
from xray.evaluation.multilabel import has_label_vectors
from xray.evaluation.suites.retrieval import RETRIEVAL
from xray.evaluation.suites.zero_shot import ZERO_SHOT
from xray.evaluation.zero_shot import NamedClasses
from xray.recipes.recipe import Recipe
from xray.reports.figures import subplots, svg
from xray.reports.html import Card, cards, paragraph
from xray.reports.tables import ResultTable

TAGS = 5  # per image
LOOKED_AT = 240  # samples that are encoded, evenly spaced over their data set
SHOWN = 3  # right examples, and as many wrong ones
MATRIX = 16  # most classes of a legible confusion matrix
BATCH = 32


@dataclass
class Examples:
    """Samples of a data set: pixels [N, T, 3, S, S], all captions of each, and class indices."""

    pixels: Tensor
    captions: list[list[str]]
    labels: list[int]


def tags(artifact: Artifact, pixels: Tensor) -> str:
    """Show the most probable tags of images [B, T, 3, S, S] uint8."""
    tagger, vocabulary = Tagger(artifact), Vocabulary.load(artifact.file("vocabulary.json"))
    top = tagger.probabilities(pixels).topk(min(TAGS, len(vocabulary)), dim=1)
    shown = []
    for picture, values, ids in zip(pixels, top.values, top.indices, strict=True):
        rows = zip(values.tolist(), ids.tolist(), strict=True)
        shown.append(Card(picture[0], [f"{vocabulary.tags[i]} {v:.0%}" for v, i in rows]))
    return cards("Most probable tags", shown)


def retrieved(encoder: Encoder, recipe: Recipe, data: DataConfig) -> str:
    """Show captions whose own image is retrieved first, and some whose is not."""
    config = recipe.eval.of(RETRIEVAL)
    sets = Sets(encoder, recipe.eval, recipe.root, 0)
    source = config.open(sets, RETRIEVAL.name, "shards")
    examples = read_examples(source, data, config.captions)
    known = [number for number, own in enumerate(examples.captions) if own]
    if len(known) < 2:
        return ""
    pixels = examples.pixels[known]
    texts = [examples.captions[number][0] for number in known]
    order = (encoder.encode_text(texts) @ _encoded(encoder, pixels).t()).argsort(1, descending=True)
    rank = (order == torch.arange(len(known))[:, None]).int().argmax(dim=1)
    right = (rank == 0).nonzero()[:, 0].tolist()[:SHOWN]
    wrong = (rank > 0).nonzero()[:, 0].tolist()[:SHOWN]
    shown: list[Card | tuple[Card, Card]] = []
    shown += [Card(pixels[n, 0], [f"right: {texts[n]}"]) for n in right]
    for n in wrong:
        nearest = Card(pixels[int(order[n, 0]), 0], [f"retrieved for: {texts[n]}"])
        own = Card(pixels[n, 0], [f"the right image, at rank {rank[n] + 1}"])
        shown.append((nearest, own))
    share = (rank == 0).float().mean()
    note = f"For {share:.0%} of {len(known)} captions the nearest image is the right one."
    return cards("Images retrieved for captions", shown) + paragraph(note)


def confused(encoder: Encoder, recipe: Recipe, data: DataConfig) -> str:
    """Show which classes zero-shot classification confuses, in the first of several splits.

    Returns "" for samples with several classes.
    """
    sets, config = Sets(encoder, recipe.eval, recipe.root, 0), recipe.eval.of(ZERO_SHOT)
    if config.splits:
        first: Any = sets.splits(ZERO_SHOT.name, config)[0]
        sets.config = replace(recipe.eval, zero_shot=replace(config, split=first))  # type: ignore[type-var]
    classes = NamedClasses.open(sets)
    examples = read_examples(classes.source, data)
    if not examples.labels or has_label_vectors(classes.source):
        return ""
    names, labels = classes.names, classes.number(torch.tensor(examples.labels), classes.source)
    predicted = (_encoded(encoder, examples.pixels) @ classes.weights(sets).t()).argmax(dim=1)
    share = (predicted == labels).float().mean()
    note = paragraph(f"Of {len(labels)} samples, {share:.0%} are classified correctly.")
    if len(names) > MATRIX:
        return _mistakes(names, labels, predicted).html() + note
    return f"<h2>Zero-shot classes</h2>{_matrix(names, labels, predicted)}{note}"


def _matrix(names: Sequence[str], labels: Tensor, predicted: Tensor) -> str:
    """Draw the confusion matrix: true classes in rows, predicted ones in columns."""
    counts = torch.zeros(len(names), len(names))
    counts.index_put_((labels, predicted), torch.ones(len(labels)), accumulate=True)
    figure, (axis,) = subplots(1, (4.4, 4.2))
    axis.imshow(counts.numpy(), cmap="Blues")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axis.set_xlabel("predicted class", fontsize=8)
    axis.set_ylabel("class", fontsize=8)
    for row, column in counts.nonzero().tolist():
        strong = counts[row, column] > 0.6 * counts.max()
        axis.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if strong else "black")  # fmt: skip
    return svg(figure, "Confusion matrix of zero-shot classes")


def _mistakes(names: Sequence[str], labels: Tensor, predicted: Tensor) -> ResultTable:
    """List the most frequent confusions, if there are too many classes for a matrix."""
    pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
    wrong = Counter((a, b) for a, b in pairs if a != b)
    table = ResultTable("Zero-shot classes confused", ("class", "predicted", "samples"))
    table.rows += [(names[a], names[b], str(n)) for (a, b), n in wrong.most_common(12)]
    return table


def _encoded(encoder: Encoder, pixels: Tensor) -> Tensor:
    return torch.cat([encoder.encode_pixels(part) for part in pixels.split(BATCH)])


def read_examples(
    source: Source, data: DataConfig, fields: dict[str, float] | None = None
) -> Examples:
    """Read samples evenly spaced over a source, at the sizes of the end of training."""
    size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
    places = list(source.places())
    step = max(1, -(-len(places) // LOOKED_AT))
    examples = Examples(torch.empty(0), [], [])
    pixels = []
    for place in places[::step]:
        sample = source.sample(*place, *size)
        try:
            pixels.append(load_pixels(sample, data, None))
        except BadSample:
            continue
        examples.labels.append(label_of(sample.files))
        try:
            examples.captions.append(captions_of(sample.files, fields))
        except BadSample:  # it has none
            examples.captions.append([])
    if pixels:
        examples.pixels = torch.stack(pixels)
    return examples
