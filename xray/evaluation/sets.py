"""The sets of an evaluation and their features, each extracted once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.folders import open_labelled
from data_pipelines.manifest import resolve
from data_pipelines.shards import Modality
from data_pipelines.sources import Source
from xray.config import DataConfig
from xray.errors import ArtifactError, ConfigError, DataError
from xray.evaluation.config import EvalConfig, LabelledConfig
from xray.evaluation.features import Features, Look, extract_spaces, spaces_of
from xray.restore import Encoder, TextEncoder, VisionEncoder, data_config


class Sets:
    """What suites ask for: sources by where they are, and their features by space."""

    def __init__(
        self, encoder: VisionEncoder | TextEncoder, config: EvalConfig, root: str, workers: int
    ) -> None:
        config.views.validate()
        self.encoder, self.config = encoder, config
        plain = data_config(encoder.artifact)
        self.data = dataclasses.replace(plain, root=root, workers=workers)
        self.look = Look(config.views.clips, config.views.crops)
        self._sources: dict[tuple[str, Modality], Source] = {}
        self._features: dict[int, dict[str, Features]] = {}  # by the id of an opened source

    @property
    def joint(self) -> Encoder:
        """The encoder of a clip artifact; raises ArtifactError for another."""
        if not isinstance(self.encoder, Encoder):
            raise ArtifactError(f"{self.what}: only a clip artifact compares pictures with text")
        return self.encoder

    @property
    def vision(self) -> VisionEncoder:
        """The encoder of an artifact with a backbone; raises ArtifactError for another."""
        if not isinstance(self.encoder, VisionEncoder):
            raise ArtifactError(f"{self.what}: it has no backbone")
        return self.encoder

    @property
    def what(self) -> str:
        """The artifact in an error's words."""
        return f"{self.encoder.artifact.path} is of stage {self.encoder.artifact.stage}"

    def open(self, name: str, pattern: str, modality: Modality) -> Source:
        """A source by its pattern; `name` is the config's key below eval."""
        key = pattern, modality
        if key not in self._sources:
            self._sources[key] = open_labelled(f"eval.{name}", pattern, modality, self.data.root)
        return self._sources[key]

    def features(self, source: Source, space: str = "backbone") -> Features:
        """All of a source in one space: backbone or joint."""
        if id(source) not in self._features:
            self._features[id(source)] = self.encode(source)
        return self._features[id(source)][space]

    def encode(
        self, source: Source, look: Look | None = None, data: DataConfig | None = None
    ) -> dict[str, Features]:
        """Features in all spaces, looked at in another way; not kept."""
        into, batch = spaces_of(self.vision), self.config.batch_size
        return extract_spaces(source, into, data or self.data, batch, look or self.look)

    def forget(self) -> None:
        """Drop all features: the encoder is another now."""
        self._features.clear()

    def labelled(self, name: str, config: LabelledConfig) -> tuple[Source, Source]:
        """The sources of training and test of a suite."""
        train = self.open(f"{name}.train", config.train, config.modality)
        return train, self.open(f"{name}.test", config.test, config.modality)

    def probe(self, name: str, config: LabelledConfig) -> tuple[Features, Features]:
        """Backbone features of training and test, whose classes are numbered as in training."""
        train, test = self.labelled(name, config)
        found = self.features(test)
        labels = renumber(found.labels, test, train.classes, f"the classes of {config.train}")
        return self.features(train), dataclasses.replace(found, labels=labels)

    def class_names(self) -> tuple[list[str], Source]:
        """The names of zero-shot's classes by number, and its source.

        Raises ConfigError or DataError for fewer than two names, or none.
        """
        config = self.config.zero_shot
        source = self.open("zero_shot", config.shards, config.modality)
        if not config.classes:
            if not source.classes:
                raise ConfigError(
                    f"{config.shards} has no class names: set eval.zero_shot.classes to a file "
                    "of them, one per line"
                )
            names = list(source.classes)
        else:
            names = _read_names(resolve(config.classes, self.data.root))
        if len(names) < 2:
            where = config.classes or config.shards
            raise ConfigError(f"{where} names {len(names)} class: zero-shot needs at least two")
        return names, source

    def zero_shot_labels(self, labels: Tensor, source: Source, names: Sequence[str]) -> Tensor:
        """The numbers that the class names give to labels of a source with names of its own."""
        given = self.config.zero_shot.classes
        if not given or (len(source.classes) == len(names) and set(source.classes) - set(names)):
            return labels  # line i names the i-th class
        return renumber(labels, source, names, given)


def renumber(labels: Tensor, source: Source, names: Sequence[str], whose: str) -> Tensor:
    """A source's class numbers as places in `names`, where both have names.

    Raises DataError for a class that is not among them.
    """
    if not source.classes or not names:
        return labels
    missing = sorted(set(source.classes) - set(names))
    if missing:
        raise DataError(f"class {missing[0]!r} of {source.name} is not among {whose}")
    places = torch.tensor([list(names).index(name) for name in source.classes])
    return places[labels]


def _read_names(path: str) -> list[str]:
    if not Path(path).is_file():
        raise ConfigError(f"eval.zero_shot.classes={path}: no such file of class names")
    return [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
