"""Data sets of an evaluation and their features, each extracted once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from data_pipelines.ingest.labelled import open_labelled, place_of
from data_pipelines.ingest.masked import MaskNames, open_masked
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.shard_list import find_shards
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import Modality
from xray.artifacts.encoders import Encoder, TextEncoder, VisionEncoder, normalised_rows
from xray.artifacts.manifest_config import data_config
from xray.config import DataConfig
from xray.errors import ArtifactError, ConfigError
from xray.evaluation.class_labels import Classes
from xray.evaluation.dealing import Task, encoded
from xray.evaluation.feature_extraction import (
    Features,
    FeaturesOf,
    TextsOf,
    Views,
    batch_samples,
    features_of,
    labels_of,
)
from xray.evaluation.suite import LabelledConfig, MaskedConfig
from xray.progress import progress_of

if TYPE_CHECKING:  # config imports the suites, which import this module
    from xray.evaluation.config import EvalConfig


def check_sets(config: EvalConfig, suites: Sequence[str], root: str) -> None:
    """Raise ConfigError or DataError if a data set that these suites read does not exist."""
    for key, pattern in config.data_sets(suites):
        path = place_of(f"eval.{key}", pattern, root)
        if is_remote(path) or os.path.exists(path):
            continue
        if not any(c in path for c in "*?[{"):
            other = resolve(pattern)
            nor = f", nor {other} in the working folder" if other != path else ""
            raise ConfigError(f"eval.{key}={pattern}: there is no {path}{nor}")
        find_shards(path)


class Sets:
    """Opened sources by their pattern, and their features by space."""

    def __init__(
        self, encoder: VisionEncoder | TextEncoder, config: EvalConfig, root: str, workers: int
    ) -> None:
        self.encoder, self.config = encoder, config
        plain = data_config(encoder.artifact)
        self.data = dataclasses.replace(plain, root=root, workers=workers)
        self.views = Views(config.views.clips, config.views.crops)
        self.dealt = False  # encoding is dealt over all ranks (Evaluator.lead)
        self._sources: dict[tuple[str, ...], Source] = {}
        self._features: dict[int, dict[str, Features]] = {}  # by the id of an opened source
        self._texts: dict[tuple[str, ...], Tensor] = {}

    @property
    def joint(self) -> Encoder:
        """Return the encoder of a joint space; raises ArtifactError if the artifact has none."""
        if not isinstance(self.encoder, Encoder):
            raise ArtifactError(f"{self.what}: it has no joint space of images and texts")
        return self.encoder

    @property
    def vision(self) -> VisionEncoder:
        """Return the encoder of images; raises ArtifactError if the artifact has no backbone."""
        if not isinstance(self.encoder, VisionEncoder):
            raise ArtifactError(f"{self.what}: it has no backbone")
        return self.encoder

    @property
    def what(self) -> str:
        """Name the artifact in an error."""
        return f"{self.encoder.artifact.path} is of stage {self.encoder.artifact.stage}"

    def open(
        self, name: str, pattern: str, modality: Modality, captions: Iterable[str] = ()
    ) -> Source:
        """Open a source by its pattern; `name` is the key below eval, for errors.

        captions: columns of a list that have captions, beside the usual ones.
        """
        key, how = f"eval.{name}", (pattern, modality, self.data.root)
        return self.once((pattern, modality, *captions), lambda: open_labelled(key, *how, captions))

    def once(self, key: tuple[str, ...], opening: Callable[[], Source]) -> Source:
        """Return the source that was opened under a key; opens it at the first call."""
        if key not in self._sources:
            self._sources[key] = opening()
        return self._sources[key]

    def masked(self, name: str, config: MaskedConfig) -> tuple[Source, Source]:
        """Open the training and the test source of a suite, whose pictures have masks."""
        names = MaskNames(config.images, config.masks, config.mask.lstrip("."))

        def opened(which: str, pattern: str) -> Source:
            own = f"eval.{name}.{which}", pattern, self.data.root, names
            return self.once((pattern, *dataclasses.astuple(names)), lambda: open_masked(*own))

        return opened("train", config.train), opened("test", config.test)

    def features(self, source: Source, space: str = "backbone") -> Features:
        """Return the features of a whole source in one space: backbone or joint."""
        if id(source) not in self._features:
            self._features[id(source)] = self.encode_once(source)
        return self._features[id(source)][space]

    def encode_once(self, source: Source) -> dict[str, Features]:
        """Extract the features of a source that has none yet."""
        return self.encode(source)

    def encode(
        self, source: Source, views: Views | None = None, data: DataConfig | None = None
    ) -> dict[str, Features]:
        """Extract a source's features in all spaces, with other views or sizes; keeps nothing."""
        size = batch_samples(source, self.config.batch_size, views or self.views)
        task = FeaturesOf(source, data or self.data, size, views or self.views)
        return features_of(source, self.encoded(task))

    def encoded(self, task: Task) -> Iterator[Mapping[str, Tensor]]:
        """Yield the tensors of each batch of a task in order, on the device; shows progress."""
        return progress_of(task.name)(encoded(self.encoder, task, self.dealt), len(task))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts into the joint space, [M, E]; the same texts are encoded once."""
        key = tuple(texts)
        if key not in self._texts:
            self._texts[key] = self.encode_texts(texts)
        return self._texts[key]

    def encode_texts(self, texts: Sequence[str], base: bool = False) -> Tensor:
        """Encode texts to [M, D], normalised; base: by a text artifact's model before tuning."""
        return normalised_rows(self.encoded(TextsOf(texts, base)))

    def forget(self) -> None:
        """Drop the features of images, after a change of the encoder's token reduction."""
        self._features.clear()

    def labelled(self, name: str, config: LabelledConfig) -> tuple[Source, Source]:
        """Open the training and the test source of a suite."""
        train = self.open(f"{name}.train", config.train, config.modality)
        return train, self.open(f"{name}.test", config.test, config.modality)

    def probe(self, name: str, config: LabelledConfig) -> tuple[Features, Features]:
        """Return backbone features of training and test, labels numbered by training's classes."""
        sources = self.labelled(name, config)
        features = [self.features(source) for source in sources]
        classes = Classes.of(features[0].labels, sources[0])
        train, test = (
            dataclasses.replace(own, labels=classes.places(own.labels, source))
            for own, source in zip(features, sources, strict=True)
        )
        return train, test

    def check_classes(self, name: str, config: LabelledConfig) -> None:
        """Raise the errors of the labels of `probe`, without decoding pictures."""
        train, test = self.labelled(name, config)
        Classes.of(labels_of(train), train).places(labels_of(test), test)
