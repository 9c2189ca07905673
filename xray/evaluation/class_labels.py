"""Labels of one data set in the numbers of another."""

from __future__ import annotations

import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.shards.source import Source
from xray.errors import DataError
from xray.evaluation.confidence import class_mean, share
from xray.evaluation.suite import RECALL

log = logging.getLogger("xray")


@dataclass(frozen=True)
class Classes:
    """The classes of a training set, which a probe numbers from 0 without gaps."""

    numbers: Tensor  # class numbers of the training set, ascending, [C]
    names: tuple[str, ...]  # by class number of the training set; () = no names
    where: str

    @classmethod
    def of(cls, labels: Tensor, source: Source) -> Classes:
        """Collect the classes of a training set's labels [N]; raises the errors of check_labels."""
        check_labels(labels, source.name)
        return cls(labels.unique(), source.classes, source.name)

    def places(self, labels: Tensor, source: Source) -> Tensor:
        """Return the position of each label of a source among the classes, [N].

        Classes are matched by name if both data sets have names, and otherwise by position: if one
        of them has names, a line says so. Raises DataError for a class that is not among them, for
        names beside another number of numbered classes, and the errors of check_labels.
        """
        check_labels(labels, source.name)
        labels = renumber(labels, source, self.names, f"the classes of {self.where}")
        if source.classes and not self.names and len(source.classes) != len(self.numbers):
            raise DataError(
                f"{source.name} has {len(source.classes)} class names, and {self.where} has only "
                f"numbers, of {len(self.numbers)} classes: give both sets names, or class numbers"
            )
        if bool(source.classes) != bool(self.names):
            named, numbered = (source.name, self.where)[:: 1 if source.classes else -1]
            tell_of_position(f"{named} has class names, and {numbered} only numbers", source.digest)
        places = torch.searchsorted(self.numbers, labels).clamp(max=len(self.numbers) - 1)
        unknown = labels[self.numbers[places] != labels].tolist()
        if unknown:
            raise DataError(
                f"class {self.name(unknown[0])!r} of {source.name} is not among the "
                f"{len(self.numbers)} classes of {self.where}"
            )
        return places

    def name(self, number: int) -> str | int:
        """Return the name of a class of the training set, or its number if it has no name."""
        return self.names[number] if number < len(self.names) else number


def renumber(labels: Tensor, source: Source, names: Sequence[str], whose: str) -> Tensor:
    """Replace each label by the position of its class in `names`; -1 stays.

    If the source or `names` has no names, labels do not change. Raises DataError for a class that
    is not in `names`.
    """
    if not source.classes or not names:
        return labels
    found = numbers_of(source.classes, names)
    missing = sorted({*source.classes} - found.keys())
    if missing:
        raise DataError(f"class {missing[0]!r} of {source.name} is not among {whose}")
    places = torch.tensor([found[name] for name in source.classes])
    return torch.where(labels < 0, labels, places[labels.clamp(min=0)])


def numbers_of(classes: Sequence[str], known: Sequence[str] | Mapping[str, int]) -> dict[str, int]:
    """Return the numbers of the classes that are known; a name that is not known is compared
    without its case and its underscores, if this finds one class.

    known: names by number, of which the first counts, or numbers by name.
    """
    if not isinstance(known, Mapping):
        known = {name: number for number, name in reversed([*enumerate(known)])}
    folded, alike = defaultdict[str, set[int]](set), Counter(map(_folded, classes))
    for name, number in known.items():
        folded[_folded(name)].add(number)
    found = {}
    for name in classes:
        numbers = folded[_folded(name)]
        if name in known:
            found[name] = known[name]
        elif len(numbers) == alike[_folded(name)] == 1:
            found[name] = min(numbers)
    return found


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


@functools.cache
def tell_of_position(why: str, digest: str) -> None:
    """Log once that the classes of a data set, with this digest, are matched by position."""
    log.warning("%s: classes are matched by position", why)


def check_labels(labels: Tensor, what: str) -> None:
    """Raise DataError for samples without a class, and for a data set with a single class."""
    if not (labels >= 0).all():
        missing = int((labels < 0).sum())
        raise DataError(
            f"{what} needs a class for every sample, {missing} of {len(labels)} have none: a .cls "
            "file, json `label` or `label_name`, a folder per class, or a .csv with a column "
            "`label`. A label is a whole number from 0 or a name"
        )
    if len(labels.unique()) < 2:
        raise DataError(f"{what} needs samples of at least two classes, all have the same")


def check_named(labels: Tensor, classes: int, what: str) -> None:
    """Raise DataError for a label without a class name, and the errors of check_labels."""
    check_labels(labels, what)
    if int(labels.max()) >= classes:
        raise DataError(
            f"{what}: a label is {int(labels.max())}, but there are {classes} class names"
        )


def guess(train: Tensor, test: Tensor) -> float:
    """Compute the accuracy of the better guess: a random class, or training's most frequent."""
    numbers, counts = train.unique(return_counts=True)
    most = numbers[counts == counts.max()]  # of several, one is guessed at random
    return max(1 / len(numbers), float(torch.isin(test, most).double().mean()) / len(most))


def accuracy(predicted: Tensor, truth: Tensor, train: Tensor) -> dict[str, float]:
    """Compute top-1 accuracy and mean per-class recall on labels [N], with intervals and chance.

    Chance is that of `guess`; for the recall, each class counts once.
    """
    hits = predicted == truth
    return {
        **share("top1", hits),
        **class_mean(RECALL, hits, truth),
        "chance_top1": guess(train, truth),
        f"chance_{RECALL}": guess(train, truth.unique()),
        "samples": float(len(truth)),
    }
