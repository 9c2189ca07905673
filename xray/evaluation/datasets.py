"""Data sets of an evaluation and their features, each extracted once."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from data_pipelines.ingest.labelled import open_labelled, place_of
from data_pipelines.ingest.masked import MaskNames, open_masked
from data_pipelines.ingest.split_files import open_splits
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.shard_list import find_shards
from data_pipelines.shards.source import ChosenSlots, Source
from data_pipelines.shards.tar_index import Modality
from xray.artifacts.encoders import (
    Encoder,
    TextEncoder,
    VisionEncoder,
    encode_longest_first,
    normalised_rows,
)
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
from xray.evaluation.splits import Part, PartFeatures, Scratch
from xray.evaluation.suite import LabelledConfig, MaskedConfig
from xray.evaluation.token_files import token_folder
from xray.progress import progress_of

if TYPE_CHECKING:  # config imports the suites, which import this module
    from xray.evaluation.config import EvalConfig
    from xray.evaluation.suites.zero_shot import ZeroShotConfig

    Divided: TypeAlias = LabelledConfig | ZeroShotConfig  # settings with `splits`


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


class ModelToComeError(Exception):
    """Data sets are asked for their model, and a stage has yet to train it."""


class Sets:
    """Opened sources by their pattern, and their features by space.

    encoder: None for checks of data before a stage has trained the model.
    """

    def __init__(
        self,
        encoder: VisionEncoder | TextEncoder | None,
        config: EvalConfig,
        root: str,
        workers: int,
    ) -> None:
        self._encoder, self.config = encoder, config
        plain = data_config(encoder.artifact) if encoder is not None else DataConfig()
        self.data = dataclasses.replace(plain, root=root, workers=workers)
        self.views = Views(config.views.clips, config.views.crops)
        self.dealt = False  # encoding is dealt over all ranks (Evaluator.lead)
        self._sources: dict[tuple[str, ...], Source] = {}
        self._features: dict[int, dict[str, Features]] = {}  # by the id of an opened source
        self._splits: dict[tuple[str, ...], dict[int, tuple[Source, Source]]] = {}
        self._parts: dict[int, Part] = {}  # by the id of the source of a part
        self._partial: dict[int, PartFeatures] = {}  # by the id of a source that has parts
        self._scratch: Scratch | None = None
        self._texts: dict[tuple[str, ...], Tensor] = {}

    @property
    def encoder(self) -> VisionEncoder | TextEncoder:
        """Return the model; raises ModelToComeError if a stage has yet to train it."""
        if self._encoder is None:
            raise ModelToComeError
        return self._encoder

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

        captions: columns of a list that have captions or tags, beside the usual ones.
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

    def tested(self, name: str, pattern: str, config: Divided) -> Source:
        """Open the set that a suite without training is measured on, or the tests of a split."""
        if config.splits:
            return self._pair(name, config)[1]
        return self.open(name, pattern, config.modality)

    def splits(self, name: str, config: Divided) -> list[int]:
        """List the numbers of the chosen splits; raises ConfigError for one that has no files."""
        there = list(self._divided(name, config))
        if config.split == "all":
            return there
        if config.split not in there:
            known = ", ".join(map(str, there))
            raise ConfigError(f"eval.{name}.split={config.split}: {config.splits} has {known}")
        return [config.split]

    def part(self, source: Source) -> Part:
        """Return the set that a source is a part of, or is, and the numbers of its samples."""
        return self._parts.get(id(source)) or Part(source, torch.arange(len(source)))

    @contextmanager
    def scratch(self) -> Iterator[Scratch]:
        """Yield a folder for files of a suite; all splits of a suite have the same one."""
        if self._scratch is not None:
            yield self._scratch
            return
        with token_folder() as folder:
            self._scratch = Scratch(folder, {})
            try:
                yield self._scratch
            finally:
                self._scratch = None

    def _pair(self, name: str, config: Divided) -> tuple[Source, Source]:
        """Return training and test clips of the chosen split; raises ConfigError for split=all."""
        if config.split == "all":
            raise ConfigError(
                f"eval.{name}.split=all: a suite that uses these sets takes one split: set it to 1"
            )
        (number,) = self.splits(name, config)
        return self._divided(name, config)[number]

    def _divided(self, name: str, config: Divided) -> dict[int, tuple[Source, Source]]:
        """Return the training and the test clips of each split."""
        labelled = isinstance(config, LabelledConfig)
        pattern = config.train if isinstance(config, LabelledConfig) else config.shards
        key = pattern, config.modality, config.splits
        if key not in self._splits:
            what = f"eval.{name}.splits"
            where = place_of(what, config.splits, self.data.root)
            opened = self.open(f"{name}.train" if labelled else name, pattern, config.modality)
            whole, pairs = open_splits(f"{what}={config.splits}", opened, where)
            for source in itertools.chain.from_iterable(pairs.values()):
                assert isinstance(source.slots, ChosenSlots)
                numbers = torch.from_numpy(source.slots.numbers)
                self._parts[id(source)] = Part(whole, numbers)
            self._splits[key] = pairs
        return self._splits[key]

    def features(self, source: Source, space: str = "backbone") -> Features:
        """Return the features of a source in one space: backbone or joint."""
        if part := self._parts.get(id(source)):
            if id(part.whole) not in self._partial:
                self._partial[id(part.whole)] = PartFeatures(part.whole)
            return self._partial[id(part.whole)].of(part.numbers, space, self.encode_once)
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
        """Encode texts to [M, D], normalised; base: by a text artifact's model before tuning.

        Raises ArtifactError if the artifact has no text tower.
        """
        if not isinstance(self.encoder, Encoder | TextEncoder):
            raise ArtifactError(f"{self.what}: it has no text tower")
        return encode_longest_first(
            texts,
            self.encoder.tokenizer,
            lambda texts: normalised_rows(self.encoded(TextsOf(texts, base))),
        )

    def forget(self) -> None:
        """Drop the features of images, after a change of the encoder's token reduction."""
        self._features.clear()
        self._partial.clear()

    def labelled(self, name: str, config: LabelledConfig) -> tuple[Source, Source]:
        """Open the training and the test source of a suite."""
        if config.splits:
            return self._pair(name, config)
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
        for train, test in self.pairs(name, config):
            Classes.of(labels_of(train), train).places(labels_of(test), test)

    def pairs(self, name: str, config: LabelledConfig) -> list[tuple[Source, Source]]:
        """List the training and test sources of all chosen splits, or the only ones."""
        if not config.splits:
            return [self.labelled(name, config)]
        divided = self._divided(name, config)
        return [divided[number] for number in self.splits(name, config)]
