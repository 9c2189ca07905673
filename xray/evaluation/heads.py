"""Classifiers whose robustness is measured: the zero-shot head and the linear probe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.shards.source import Source
from xray.artifacts.encoders import Encoder
from xray.errors import ConfigError, DataError
from xray.evaluation.class_labels import Classes, check_labels, guess, numbers_of
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Features, labels_of
from xray.evaluation.linear_probe import SOLVERS
from xray.evaluation.suites.linear_probe import LINEAR_PROBE
from xray.evaluation.suites.zero_shot import ZERO_SHOT
from xray.evaluation.zero_shot import NamedClasses


@dataclass
class HeadClasses:
    """The labelled samples of a head and its classes, which need no model.

    classes: their number. names: () if they have none. places: numbers another source's labels by
    the head's classes.
    """

    name: str
    source: Source
    classes: int
    names: Sequence[str]
    places: Callable[[Tensor, Source], Tensor]

    @functools.cached_property
    def known(self) -> dict[str, int]:
        """Numbers of the head's classes by name, also by the names in the head's own samples."""
        known = {name: number for number, name in enumerate(self.names)}
        if own := self.source.classes:
            places = self.places(torch.arange(len(own)), self.source)
            known |= dict(zip(own, places.tolist(), strict=True))
        return known

    def number(self, labels: Tensor, source: Source, some: bool = False) -> Tensor:
        """Number a source's labels [N] by the head's classes.

        Classes are matched by name: by those of the head, such as `tench`, or of its own samples,
        such as n01440764. Without a known name they are matched by position, and a line says so; a
        source without names has the head's numbers. Raises DataError for a class that the head does
        not have; some: it becomes -1, if other classes are known.
        """
        check_labels(labels, source.name)
        known = numbers_of(source.classes, self.known)
        if not known:
            return self.places(labels, source)
        unknown = [name for name in source.classes if name not in known]
        if unknown and not some:
            raise DataError(
                f"class {unknown[0]!r} of {source.name} is not among the {self.classes} classes of "
                f"{self.source.name}"
            )
        return torch.tensor([known.get(name, -1) for name in source.classes])[labels]


@dataclass
class Head(HeadClasses):
    """A classifier on the features of one space.

    scores: (features, classes [K]) -> [N, K], highest for the prediction. logits: [B, D] -> [B, C],
    differentiable.
    """

    space: str
    labels: Tensor
    chance: float
    scores: Callable[[Features, Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]

    def right(self, features: Features, labels: Tensor, among: Tensor | None = None) -> Tensor:
        """Mark correct predictions, [N]; among: the classes to choose from, ascending."""
        chosen = torch.arange(self.classes) if among is None else among
        return chosen[self.scores(features, chosen).argmax(dim=1)] == labels


def head_classes(sets: Sets) -> list[HeadClasses]:
    """List the classes of each head, without encoding; raises ConfigError if there is no head.

    Raises also ConfigError or DataError for labels that do not fit.
    """
    found = []
    if _has_zero_shot(sets):
        found.append(_named(NamedClasses.open(sets)))
    if sets.config.of(LINEAR_PROBE).has_data():
        train, test = sets.labelled("linear_probe", sets.config.of(LINEAR_PROBE))
        found.append(_probed(Classes.of(labels_of(train), train), test))
    if not found:
        raise ConfigError(
            f"{sets.what}: robustness is measured with a linear probe, set eval.linear_probe.train "
            "and .test (a zero-shot head needs a joint space)"
        )
    for head in found:
        head.places(labels_of(head.source), head.source)
    return found


def open_heads(sets: Sets) -> Iterator[Head]:
    """Yield the head of each suite that has data and that the artifact can run."""
    if _has_zero_shot(sets):
        yield _zero_shot(sets)
    if sets.config.of(LINEAR_PROBE).has_data():
        yield _linear_probe(sets)


def _has_zero_shot(sets: Sets) -> bool:
    return sets.config.of(ZERO_SHOT).has_data() and isinstance(sets.vision, Encoder)


def _named(own: NamedClasses) -> HeadClasses:
    return HeadClasses("zero_shot", own.source, len(own.names), own.names, own.number)


def _probed(own: Classes, test: Source) -> HeadClasses:
    names = [own.names[n] for n in own.numbers.tolist()] if own.names else []
    return HeadClasses("linear_probe", test, len(own.numbers), names, own.places)


def _zero_shot(sets: Sets) -> Head:
    classes = NamedClasses.open(sets)
    weights, scale = classes.weights(sets), float(sets.joint.logit_scale.detach())
    labels = sets.features(classes.source, "joint").labels
    return Head(
        **vars(_named(classes)), space="joint", labels=classes.number(labels, classes.source),
        chance=1 / len(classes.names),
        scores=lambda features, among: features.rows @ weights[among].t(),
        logits=lambda x: scale * x @ weights.to(x).t(),
    )  # fmt: skip


def _linear_probe(sets: Sets) -> Head:
    config = sets.config.of(LINEAR_PROBE)
    train, test = sets.probe("linear_probe", config)
    probe = SOLVERS[config.solver](train.views, train.labels)
    sources = sets.labelled("linear_probe", config)
    classes = Classes.of(sets.features(sources[0]).labels, sources[0])

    def scores(features: Features, among: Tensor) -> Tensor:
        return probe._replace(weights=probe.weights[:, among]).scores(features.views)

    return Head(
        **vars(_probed(classes, sources[1])), space="backbone", labels=test.labels,
        chance=guess(train.labels, test.labels), scores=scores, logits=probe.logits,
    )  # fmt: skip
