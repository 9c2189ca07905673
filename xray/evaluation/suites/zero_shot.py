"""Zero-shot classification: cosines of class names' prompts with images (CLIP, 2103.00020)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from xray.artifacts.offers import JOINT
from xray.config.identity import added
from xray.errors import ConfigError
from xray.evaluation.suite import (
    Measures,
    Row,
    Suite,
    SuiteConfig,
    check_split,
    classifier_rows,
    share_row,
    titled,
)
from xray.words import count

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets

OF_OPEN_CLIP = ("openai", "simple")  # its lists of 80 and of 7 templates
MAP = "mean_average_precision"  # of samples with several classes


@dataclass
class ZeroShotConfig(SuiteConfig):
    """Labelled samples and a file of class names, one per line; "" = the names of the data set."""

    required_sets = ("shards",)
    optional_sets = ("classes", "splits")

    shards: str = ""  # labelled samples: shards, a folder of class folders, or a list
    classes: str = ""  # file of class names, one per line; "" = the names of the data set
    # texts for a class, whose vectors are averaged: openai (CLIP's 80), simple (7 of them), a file
    # with one per line, or a list; {} or {c} is the class name
    templates: str | list[str] = field(default_factory=lambda: ["a photo of a {}"])
    modality: Literal["image", "video"] = "image"  # of the samples
    # folder of split files of HMDB51 or UCF101: only their test clips are classified
    splits: str = added("")
    split: Literal["all", 1, 2, 3] = added("all")  # of `splits`; all = the mean over all of them

    def validate(self, key: str) -> None:
        super().validate(key)
        check_split(key, self.splits, self.split)
        given = self.templates
        if not given or (isinstance(given, list) and not all(map(is_template, given))):
            raise ConfigError(
                f"{key}.templates: each needs {{}} or {{c}} where the class name goes"
            )
        if given in OF_OPEN_CLIP and importlib.util.find_spec("open_clip") is None:
            raise ConfigError(
                f"{key}.templates={given} reads the templates of open_clip: "
                "pip install 'xray-trainer[open_clip]'"
            )

    def files(self) -> dict[str, str]:
        file = self.templates_file()
        return self.sets() | ({"templates": file} if file else {})

    def templates_file(self) -> str:
        """Return the file of the templates, "" if they are in the config or of open_clip."""
        given = self.templates
        inside = isinstance(given, list) or given in OF_OPEN_CLIP or is_template(given)
        return "" if inside else str(given)


def is_template(text: str) -> bool:
    """Check if a text has a place for the class name."""
    return "{}" in text or "{c}" in text


def _check(sets: Sets, config: ZeroShotConfig) -> None:
    from xray.evaluation.feature_extraction import labels_of
    from xray.evaluation.multilabel import has_label_vectors, label_vectors
    from xray.evaluation.zero_shot import NamedClasses

    classes = NamedClasses.open(sets)
    if has_label_vectors(classes.source):
        label_vectors(classes.source, len(classes.names))
    else:
        classes.number(labels_of(classes.source), classes.source)


def _run(sets: Sets, config: ZeroShotConfig) -> Measures:
    from xray.evaluation.multilabel import has_label_vectors, label_vectors, mean_precision
    from xray.evaluation.prompts import prompt_templates
    from xray.evaluation.zero_shot import NamedClasses, zero_shot

    classes = NamedClasses.open(sets)
    prompts = len(prompt_templates(config, sets.data.root))
    features = sets.features(classes.source, "joint")
    if has_label_vectors(classes.source):
        truth = label_vectors(classes.source, len(classes.names))
        measures = mean_precision(features.rows @ classes.weights(sets).t(), truth)
    else:
        labels = classes.number(features.labels, classes.source)
        measures = zero_shot(features.rows, labels, classes.weights(sets))
    return {**measures, "prompts": float(prompts)}


def _rows(measures: Measures) -> Iterator[Row]:
    samples = count(measures["samples"], "sample")
    over = f"{samples}, {count(measures['classes'], 'class', 'classes')}"
    if MAP in measures:
        if left_out := measures["absent_classes"]:
            over += f"; {left_out:,.0f} without samples, left out"
        yield share_row("zero-shot mAP", measures, MAP, measures[f"chance_{MAP}"], over)
        return
    yield from classifier_rows("zero-shot", measures, ("top1", "top5"), over)


def _notes(measures: Measures) -> Iterator[str]:
    if measures.get("prompts") == 1:
        yield "zero-shot: one prompt for each class; CLIP's 80: eval.zero_shot.templates=openai"


ZERO_SHOT = Suite(
    "zero_shot",
    ZeroShotConfig,
    needs=frozenset({JOINT}),
    run=_run,
    rows=_rows,
    title=titled("zero-shot"),
    compared=("top1",),
    notes=_notes,
    check=_check,
)
