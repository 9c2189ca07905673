"""The sets of an evaluation and their features, each extracted once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from torch import Tensor

from data_pipelines.ingest.labelled import open_labelled, spaced
from data_pipelines.shards.manifest import find_shards, resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import Modality
from data_pipelines.shards.utf8 import read_utf8
from xray.artifacts.encoders import Encoder, TextEncoder, VisionEncoder, data_config
from xray.config import DataConfig
from xray.errors import ArtifactError, ConfigError
from xray.evaluation.class_labels import Classes, check_named, renumber
from xray.evaluation.config import EvalConfig, LabelledConfig
from xray.evaluation.feature_extraction import Features, Look, extract_spaces, spaces_of


def check_sets(config: EvalConfig, suites: Sequence[str], root: str) -> None:
    """Raise ConfigError or DataError where a set that these suites read is not there."""
    for key, pattern in config.sets(suites):
        where = resolve(pattern, root)
        if is_remote(where) or os.path.exists(where):
            continue
        if not any(c in where for c in "*?[{"):
            raise ConfigError(f"eval.{key}={pattern}: there is no {where}")
        find_shards(where)


class Sets:
    """What suites ask for: sources by where they are, and their features by space."""

    def __init__(
        self, encoder: VisionEncoder | TextEncoder, config: EvalConfig, root: str, workers: int
    ) -> None:
        self.encoder, self.config = encoder, config
        plain = data_config(encoder.artifact)
        self.data = dataclasses.replace(plain, root=root, workers=workers)
        self.look = Look(config.views.clips, config.views.crops)
        self._sources: dict[tuple[str, Modality], Source] = {}
        self._features: dict[int, dict[str, Features]] = {}  # by the id of an opened source
        self._texts: dict[tuple[str, ...], Tensor] = {}

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

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[M, E] of texts in the joint space, encoded once."""
        key = tuple(texts)
        if key not in self._texts:
            self._texts[key] = self.joint.encode_text(texts)
        return self._texts[key]

    def forget(self) -> None:
        """Drop the features of pictures: their tokens are reduced in another way now."""
        self._features.clear()

    def labelled(self, name: str, config: LabelledConfig) -> tuple[Source, Source]:
        """The sources of training and test of a suite."""
        train = self.open(f"{name}.train", config.train, config.modality)
        return train, self.open(f"{name}.test", config.test, config.modality)

    def probe(self, name: str, config: LabelledConfig) -> tuple[Features, Features]:
        """Backbone features of training and test, labelled by place among training's classes."""
        sources = self.labelled(name, config)
        features = [self.features(source) for source in sources]
        classes = Classes.of(features[0].labels, sources[0])
        train, test = (
            dataclasses.replace(own, labels=classes.places(own.labels, source))
            for own, source in zip(features, sources, strict=True)
        )
        return train, test

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
        """Labels of a source as places among zero-shot's class names.

        Names of its own that are all others, and as many, are taken for other words for the same
        classes in the same order. Raises DataError where some are the same and some are not.
        """
        config, own = self.config.zero_shot, source.classes
        if len(own) != len(names) or set(own) & set(names):
            labels = renumber(labels, source, names, f"those of {config.classes or config.shards}")
        check_named(labels, len(names), source.name)
        return labels


def _read_names(path: str) -> list[str]:
    lines = read_utf8(path, "eval.zero_shot.classes").splitlines()
    return list(spaced(line.strip() for line in lines if line.strip()))
