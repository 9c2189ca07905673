"""Features of named data sets: each picture is decoded once, and kept until its last use."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.ingest.labelled import place_of
from data_pipelines.ingest.masked import MaskedFiles
from data_pipelines.ingest.plain_files import FileSource
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import ChosenSlots, Source
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Features, labels_of
from xray.evaluation.named_sets import NamedSet
from xray.evaluation.suite import Suite, SuiteConfig
from xray.evaluation.suites.compression import CompressionConfig
from xray.evaluation.suites.robustness import RobustnessConfig
from xray.files import sha256_file


class SharedSets(Sets):
    """Data sets that may have pictures in common, such as captions and classes of the same ones.

    Features of a picture that another open source has, too, are taken from there.
    """

    def of(self, own: NamedSet) -> SharedSets:
        """Return the same sources and features with the settings of a set."""
        sets = copy.copy(self)
        sets.config = own.config.filled()
        return sets

    def encode_once(self, source: Source) -> dict[str, Features]:
        """Extract the features of the samples whose pictures no other open source has."""
        keys = picture_keys(source)
        held = [
            (picture_keys(other), self._features[id(other)])
            for other in self._sources.values()
            if id(other) in self._features and other.modality == source.modality
        ]
        found = [(_positions(keys, known), features) for known, features in held]
        for partial in self._partial.values():
            if partial.spaces and partial.whole.modality == source.modality:
                places = _positions(keys, picture_keys(partial.whole))
                places[(places >= 0) & ~partial.done.numpy()[places]] = -1
                found.append((places, partial.spaces))
        new = np.ones(len(keys), bool)
        for places, _ in found:
            new &= places < 0
        if new.all():
            return self.encode(source)
        if new.any():
            places = np.full(len(keys), -1)
            places[new] = np.arange(new.sum())
            found.append(
                (places, self.encode(source.with_slots(ChosenSlots(source, np.flatnonzero(new)))))
            )
        return _joined(found, labels_of(source))

    def following(self, uses: Uses, done: int) -> SharedSets:
        """Return the open sources, with their features, that sets after number `done` still need.

        The texts that were encoded last stay: the next set may have the same classes.
        """
        after = SharedSets(self.encoder, self.config, self.data.root, self.data.workers)
        after.dealt = self.dealt
        for key, source in self._sources.items():
            if uses.later(picture_keys(source), done):
                after._sources[key] = source
                if id(source) in self._features:
                    after._features[id(source)] = self._features[id(source)]
        for key, pairs in self._splits.items():
            parts = [*itertools.chain(*pairs.values())]
            whole = self._parts[id(parts[0])].whole
            if uses.later(picture_keys(whole), done):
                after._splits[key] = pairs
                after._parts.update((id(part), self._parts[id(part)]) for part in parts)
                if id(whole) in self._partial:
                    after._partial[id(whole)] = self._partial[id(whole)]
        after._texts.update(list(self._texts.items())[-1:])
        return after


def picture_keys(source: Source) -> np.ndarray:
    """Return a number for the place of each sample's picture, [N]: a file, or a member of a tar."""
    if isinstance(source, FileSource):
        items = (source.items[member] for _, member in source.places())
        names = [hash((os.path.realpath(i.path), i.column and i.row)) for i in items]
    else:
        tars = [source.manifest.path(shard) for shard in range(len(source.manifest))]
        tars = [tar if is_remote(tar) else os.path.realpath(tar) for tar in tars]
        names = [hash((tars[shard], member)) for shard, member in source.places()]
    return np.array(names, np.int64)


def _positions(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the position in `known` of each wanted key, -1 if it is not there."""
    if not len(known):
        return np.full(len(wanted), -1)
    order = known.argsort()
    places = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[places] == wanted, places, -1)


def _joined(
    found: Sequence[tuple[np.ndarray, Mapping[str, Features]]], labels: torch.Tensor
) -> dict[str, Features]:
    """Join features of parts; each has its positions in the part [N], -1 for other samples."""
    joined = {}
    for space, example in found[0][1].items():
        views = example.views.new_empty(len(labels), *example.views.shape[1:])
        rows = example.rows.new_empty(len(labels), *example.rows.shape[1:])
        for places, features in found:
            mine = torch.from_numpy(np.flatnonzero(places >= 0))
            taken = torch.from_numpy(places[places >= 0])
            views[mine], rows[mine] = features[space].views[taken], features[space].rows[taken]
        joined[space] = Features(rows, labels, views)
    return joined


@dataclass(frozen=True)
class Data:
    """A data set that a suite reads. source: None if it is not of samples, such as a text file."""

    place: str
    source: Source | None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash that changes with the names, sizes or times of the files."""
        state, source = hashlib.sha256(), self.source
        if source is not None:
            state.update(source.manifest.digest.encode())
            if not is_remote(self.place):  # a changed label may leave all sizes as they were
                state.update(source.manifest.columns["mtimes"].tobytes())
        if isinstance(source, MaskedFiles):
            for mask in source.masks:
                state.update(_stamp(mask))
        if os.path.isfile(self.place) and (source is None or isinstance(source, FileSource)):
            state.update(sha256_file(Path(self.place)).encode())
        elif source is None:
            for folder, _, names in sorted(os.walk(self.place)):
                for name in sorted(names):
                    state.update(_stamp(Path(folder, name)))
        return state.hexdigest()


def _stamp(path: Path) -> bytes:
    facts = os.stat(path)
    return f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape")


def data_of(sets: Sets, suites: Sequence[Suite[Any]]) -> Iterator[Data]:
    """Yield the data sets that suites read, and the files that their settings name."""
    for suite in suites:
        for key, part in suite.sections(sets.config.of(suite)).items():
            for name, pattern in part.files().items():
                place = place_of(f"eval.{key}.{name}", pattern, sets.data.root)
                yield Data(place, _opened(sets, suite, key, part, name))


def _opened(sets: Sets, suite: Suite[Any], key: str, part: SuiteConfig, name: str) -> Source | None:
    """Open a data set of samples as its suite does; returns None for other files."""
    if isinstance(part, RobustnessConfig) and name.startswith("shift"):
        heads = [sets.config.of(reader) for reader in suite.reads]
        modality: Any = next((own.modality for own in heads if own.has_data()), "image")
        return sets.open(f"{key}.{name}", part.files()[name], modality)
    if name in part.required_sets or isinstance(part, CompressionConfig):
        return part.open(sets, key, name)
    return None


class Uses:
    """Order of named sets, and when their pictures are needed; pictures: keys of each set."""

    def __init__(self, pictures: Sequence[np.ndarray]) -> None:
        self.order = _grouped(pictures)
        rows = [np.empty(0, np.int64), *(pictures[number] for number in self.order)]
        self.known, inverse = np.unique(np.concatenate(rows), return_inverse=True)
        self.last = np.zeros(len(self.known), int)  # place in the order
        lengths = np.array([len(row) for row in rows[1:]], int)
        np.maximum.at(self.last, inverse, np.repeat(np.arange(len(lengths)), lengths))

    def later(self, keys: np.ndarray, done: int) -> bool:
        """Return True if a set after place `done` in the order has one of these pictures."""
        places = _positions(keys, self.known)
        return bool((self.last[places[places >= 0]] > done).any())


def _grouped(pictures: Sequence[np.ndarray]) -> list[int]:
    """Return the numbers of the sets so that those that share pictures follow each other."""
    groups: list[tuple[np.ndarray, list[int]]] = []
    for number, own in enumerate(pictures):
        for place, (known, members) in enumerate(groups):
            if np.isin(own, known).any():
                members.append(number)
                groups[place] = np.union1d(known, own), members
                break
        else:
            groups.append((own, [number]))
    return [number for _, members in groups for number in members]
