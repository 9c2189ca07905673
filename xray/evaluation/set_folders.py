"""Recognises the data of a set in a folder, and the suites that it can be evaluated with.

Known layouts: CLIP_benchmark's webdataset folders, class folders and lists, each with or without
train and test.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.ingest.labelled import class_of, open_labelled
from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.user_data import open_data
from data_pipelines.shards.shard_list import tars_in
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import find_captions
from xray.errors import ConfigError, DataError
from xray.evaluation.config import EvalConfig
from xray.evaluation.suite import LabelledConfig
from xray.evaluation.suites import SUITES
from xray.evaluation.suites.knn import KNN
from xray.evaluation.suites.linear_probe import LINEAR_PROBE
from xray.evaluation.suites.retrieval import RETRIEVAL, VIDEO_RETRIEVAL
from xray.evaluation.suites.zero_shot import ZERO_SHOT
from xray.files import lines_of, read_text

TESTS, TRAINS = ("test", "val"), ("train",)  # names of a split: a folder or a list
LISTS = ("csv", "tsv", "jsonl", "json", "parquet")
CLASSES = ("classnames.txt", "classes.txt")
TEMPLATES = "zeroshot_classification_templates.txt"  # with {c} for the class name
KIND = "dataset_type.txt"  # retrieval or multilabel; otherwise classification
SHARDS = "nshards.txt"  # number of shards of a split
FIRST = 100  # samples that are looked at


@dataclass
class Recognised:
    """The data of a folder as keys of suites' sections, and the suites that fit it."""

    values: dict[str, Any]
    fitting: list[str] = field(default_factory=list)  # by default
    probes: bool = False  # any suite with a training and a test set fits

    def suites(self, asked: Sequence[str]) -> tuple[str, ...]:
        """Return the suites that fit; of those asked for by name, all that can take the data."""
        more = [
            suite.name
            for suite in SUITES
            if self.probes
            and suite.name in asked
            and isinstance(suite.Config, type)
            and issubclass(suite.Config, LabelledConfig)
        ]
        return tuple(dict.fromkeys([*self.fitting, *more]))


def recognise(name: str, folder: str, config: EvalConfig) -> Recognised:
    """Recognise the data of a folder; raises ConfigError, or DataError if there is none."""
    if not os.path.isdir(folder):
        raise ConfigError(f"there is no folder {folder}")
    test, train = _split(folder, TESTS), _split(folder, TRAINS)
    if not test and train:
        raise DataError(f"{folder} has a train, but neither test nor val")
    test = test or _only_list(folder) or folder
    modality: Any = open_data(test, Request(name)).modality
    source = open_labelled(name, test, modality)
    kind = _text(folder, KIND).strip().lower()
    found = Recognised({"test": test, "shards": test, "modality": modality})
    names = next((path for path in _paths(folder, CLASSES) if os.path.isfile(path)), "")
    first = [*itertools.islice(source.places(), FIRST)]
    files = source.read(*first[0], ("cls", "json", "npy"))
    labelled = kind != "retrieval" and bool(class_of(files))
    if kind == "multilabel" or (kind != "retrieval" and "npy" in files) or labelled:
        _add_classes(found, folder, names, source)
    if labelled and train:
        _add_train(found, name, train, config)
    if kind == "retrieval" or (not names and any(find_captions(source, *p) for p in first)):
        found.fitting.append((RETRIEVAL if modality == "image" else VIDEO_RETRIEVAL).name)
        found.values["lines"] = os.path.isfile(os.path.join(test, SHARDS))
    if not found.fitting:
        raise DataError(
            f"{folder} cannot be evaluated: it has neither captions, nor classes with names "
            f"({' or '.join(CLASSES)}), nor a train with classes"
        )
    return found


def _add_classes(found: Recognised, folder: str, names: str, source: Source) -> None:
    if names:
        found.values["classes"] = names
    if names or source.classes:
        found.fitting.append(ZERO_SHOT.name)
    templates = [line.strip() for line in lines_of(_text(folder, TEMPLATES)) if line.strip()]
    if templates:
        found.values["templates"] = [line.replace("{c}", "{}") for line in templates]


def _add_train(found: Recognised, name: str, train: str, config: EvalConfig) -> None:
    found.values["train"], found.probes = train, True
    samples = len(open_labelled(name, train, found.values["modality"]))
    found.fitting += [KNN.name] if samples >= config.of(KNN).k else []
    found.fitting.append(LINEAR_PROBE.name)


def _split(folder: str, names: Sequence[str]) -> str:
    """Return the first of these splits that exists, a folder or a list; "" for none."""
    for path in _paths(folder, names):
        if os.path.isdir(path):
            _check_shards(path)
            return path
        if found := [f"{path}.{end}" for end in LISTS if os.path.isfile(f"{path}.{end}")]:
            return found[0]
    return ""


def _check_shards(split: str) -> None:
    """Raise DataError if shards are missing of those that nshards.txt counts."""
    if text := _text(split, SHARDS).strip():
        there = len(tars_in(split))
        if text != str(there):
            raise DataError(
                f"{os.path.join(split, SHARDS)} says {text[:20]!r} shards, and there are {there}: "
                "download the set again"
            )


def _only_list(folder: str) -> str:
    """Return the only list of a folder without shards, or ""; raises DataError for several."""
    if tars_in(folder):
        return ""
    lists = sorted(n for n in os.listdir(folder) if n.rpartition(".")[2].lower() in LISTS)
    if len(lists) > 1:
        raise DataError(f"{folder} has several lists, {', '.join(lists)}: name one in a .yaml file")
    return os.path.join(folder, lists[0]) if lists else ""


def _paths(folder: str, names: Sequence[str]) -> list[str]:
    return [os.path.join(folder, name) for name in names]


def _text(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    return read_text(path, path) if os.path.isfile(path) else ""
