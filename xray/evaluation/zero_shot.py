"""Zero-shot classification: cosines of class names' prompts with images (CLIP, 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.ingest.labelled import place_of, spaced
from data_pipelines.shards.source import Source
from xray.artifacts.encoders import class_weights
from xray.errors import ConfigError
from xray.evaluation.class_labels import check_named, numbers_of, renumber, tell_of_position
from xray.evaluation.confidence import class_mean, share
from xray.evaluation.datasets import Sets
from xray.evaluation.prompts import prompt_templates
from xray.evaluation.suite import RECALL
from xray.evaluation.suites.zero_shot import ZERO_SHOT
from xray.files import lines_of, read_text

HELD = 2**26  # similarities in memory at a time: 256 MiB


@dataclass(frozen=True)
class NamedClasses:
    """The classes of zero-shot classification: their names by number, and the labelled source."""

    names: list[str]
    source: Source
    origin: str  # the pattern that the names come from

    @classmethod
    def open(cls, sets: Sets) -> NamedClasses:
        """Open the source and read the names; raises ConfigError for fewer than two."""
        config = sets.config.of(ZERO_SHOT)
        source = sets.tested("zero_shot", config.shards, config)
        if not config.classes:
            if not source.classes:
                raise ConfigError(
                    f"{config.shards} has no class names: set eval.zero_shot.classes to a file "
                    "of them, one per line"
                )
            names = list(source.classes)
        else:
            path = place_of("eval.zero_shot.classes", config.classes, sets.data.root)
            lines = lines_of(read_text(path, "eval.zero_shot.classes"))
            names = list(spaced(line.strip() for line in lines if line.strip()))
        origin = config.classes or config.shards
        if len(names) < 2:
            raise ConfigError(f"{origin} names {len(names)} class: zero-shot needs at least two")
        return cls(names, source, origin)

    def number(self, labels: Tensor, source: Source) -> Tensor:
        """Number a source's labels [N] by their places among the names.

        If no name of the source is among the names but the counts are equal, classes are matched
        by position, and a line says so. Raises DataError if only some of the names are the same.
        """
        own = source.classes
        if len(own) != len(self.names) or numbers_of(own, self.names):
            labels = renumber(labels, source, self.names, f"those of {self.origin}")
        else:
            why = f"{source.name}: none of the class names is among those of {self.origin}"
            tell_of_position(why, source.digest)
        check_named(labels, len(self.names), source.name)
        return labels

    def weights(self, sets: Sets) -> Tensor:
        """Encode the names in the prompt templates: [C, E], normalised."""
        templates = prompt_templates(sets.config.of(ZERO_SHOT), sets.data.root)
        return class_weights(sets.texts, self.names, templates)


def zero_shot(features: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
    """Measure top-1 and top-5 accuracy and mean per-class recall, with chance.

    features: [N, D]. labels: [N]. weights: class features [C, D].
    """
    classes = len(weights)
    check_named(labels, classes, "zero-shot")
    rows = max(1, HELD // classes)
    first = min(5, classes)
    top = torch.cat([(part @ weights.t()).topk(first).indices for part in features.split(rows)])
    hits = top == labels[:, None]
    return {
        **share("top1", hits[:, 0]),
        **share("top5", hits.any(dim=1)),
        **class_mean(RECALL, hits[:, 0], labels),
        "chance_top1": 1 / classes,
        f"chance_{RECALL}": 1 / classes,
        "chance_top5": first / classes,
        "samples": float(len(labels)),
        "classes": float(classes),
    }
