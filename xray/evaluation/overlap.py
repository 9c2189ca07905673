"""Samples of evaluation sets that an artifact or its ancestors trained on, and of a test set that
are in the training set of a probe.

A sample is the same if its picture or clip has the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from data_pipelines.ingest.plain_files import FileSource
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import Source, open_source
from data_pipelines.shards.tar_index import media_extensions, media_in
from xray.artifacts.artifact import Artifact
from xray.artifacts.lineage import lineage
from xray.artifacts.offers import IMPORTED
from xray.errors import BadSample, DataError
from xray.evaluation.datasets import Sets
from xray.evaluation.suite import LabelledConfig, MaskedConfig, Suite

OVERLAP = "overlap"  # key of the shares in the results
Tested = tuple[str, Source, Source | None]  # key, data set, training set of a probe
MOST = 100_000  # training samples of a source to compare one by one


@dataclass(frozen=True)
class Trained:
    """A source that a stage of a lineage trained on, as its manifest records it."""

    stage: str
    name: str
    where: str  # its shards; "" if the manifest does not say
    modality: Any
    animations: Any
    digest: str  # of the samples; "" if the manifest does not say
    chosen: bool = False  # by a keep-list or for class balance: the digest is not of the shards

    @cached_property
    def source(self) -> Source | None:
        """The shards as they are now; None if they are not there, remote or too many."""
        if not self.where or is_remote(self.where):
            return None
        try:
            source = open_source(self.name, self.where, self.modality, "", self.animations)
        except (DataError, OSError):
            return None
        return source if len(source) <= MOST else None

    def is_all_of(self, source: Source) -> bool:
        """Check if the stage trained on exactly the shards of a source."""
        kind = {"modality": self.modality, "animations": self.animations}
        return replace(source, name=self.name, **kind).digest == self.digest


@dataclass
class Overlap:
    """Shares of test samples, above 0, that were trained on: `SUITE.KEY`, by the artifact or its
    ancestors, and `SUITE.KEY in train`, by the suite itself.
    """

    shares: dict[str, float] = field(default_factory=dict)
    unknown: str = ""  # line that says what could not be compared


Training = tuple[list[Trained], list[str]]


def trained_on(artifact: Artifact) -> Training:
    """List the sources of an artifact and its ancestors, and the stages that are not known."""
    found: dict[tuple[str, ...], Trained] = {}
    unknown = []
    for link in lineage(artifact.path):
        config = (link.manifest or {}).get("config", {})
        data = config.get("data")
        if link.manifest is not None and IMPORTED in link.manifest:
            unknown.append(IMPORTED)  # in place of its stage
            continue
        if link.manifest is None or not isinstance(data, Mapping):
            unknown.append(link.stage)
            continue
        digests = link.manifest.get("sources") or {}
        used = {block.get("source") for block in data.get("blocks", ())}
        used &= set(digests) or used  # without the blocks of modalities that were left out
        for name, source in data.get("sources", {}).items():
            if name in used and source.get("modality") != "text":
                where = resolve(source.get("shards", ""), data.get("root", ""))
                kind = source.get("modality", "image"), source.get("animations", "image")
                balanced = "balance" in (config.get(link.stage) or {})
                chosen = balanced or bool(source.get("keep"))
                own = Trained(link.stage, name, where, *kind, str(digests.get(name, "")), chosen)
                found.setdefault((where, *kind, own.digest), own)
    return list(found.values()), unknown


def find_overlap(
    sets: Sets, suites: Sequence[Suite[Any]], known_training: Training | None = None
) -> Overlap:
    """Compare the data sets of suites with what the artifact trained on.

    known_training: `trained_on` of the artifact, for several calls.
    """
    trained, unknown = known_training or trained_on(sets.encoder.artifact)
    # several stages may share one
    places = {(own.where, own.modality, own.animations): own.source for own in trained}
    overlap, known = Overlap(), dict[int, float]()
    for key, source, gallery in tested(sets, suites):
        if id(source) not in known:
            seen = np.zeros(len(source), bool)
            seen |= any(own.is_all_of(source) for own in trained)
            for other in places.values():
                seen |= _shared(source, other)
            known[id(source)] = float(seen.mean())
        if known[id(source)]:
            overlap.shares[key] = known[id(source)]
        if gallery is not None and (same := _shared(source, gallery)).any():
            overlap.shares[f"{key} in train"] = float(same.mean())
    same_as_then = {
        own.where for own in trained if own.source and (own.chosen or own.is_all_of(own.source))
    }
    unsure = {own.where: own.stage for own in trained if own.where not in same_as_then}
    missing = [f"{stage} ({where or 'not recorded'})" for where, stage in unsure.items()]
    missing += [f"{stage} (not recorded)" for stage in unknown if stage != IMPORTED]
    if known:
        overlap.unknown = _unknown(IMPORTED in unknown, missing)
    return overlap


def _unknown(imported: bool, missing: Sequence[str]) -> str:
    """Say what could not be compared: imported weights, and the data of stages; "" for nothing."""
    lines = []
    if imported:
        lines.append("what the imported weights were trained on is not known")
    if missing:
        lines.append(
            f"not all that stage {', '.join(missing)} trained on could be compared: the shards are "
            f"not there, may have changed since, or have more than {MOST:,} samples"
        )
    return f"overlap: {'; '.join(lines)}" if lines else ""


def overlap_lines(shares: Mapping[str, float]) -> list[str]:
    """Describe the shares of an overlap: a line for each set of keys with the same share."""
    lines = {
        " in train": "of the samples of {} are in the training set of the same suite, too",
        "": "of the samples of {} are among those that the artifact trained on",
    }
    found = []
    for ending, line in lines.items():
        keys: dict[float, list[str]] = defaultdict(list)
        for key, share in shares.items():
            if key.endswith(" in train") == bool(ending):
                keys[share].append(f"eval.{key.removesuffix(ending)}")
        found += [
            f"overlap: {_percent(share)} " + line.format(", ".join(own))
            for share, own in keys.items()
        ]
    return found


def _percent(share: float) -> str:
    """Format a share that is neither 0 nor rounded to 0."""
    return f"{100 * share:.1f} %" if share >= 0.001 else "less than 0.1 %"


def tested(sets: Sets, suites: Sequence[Suite[Any]]) -> Iterator[Tested]:
    """Open each data set that results are about; raises DataError, or ConfigError."""
    readers = {reader.name: reader for suite in suites for reader in (suite, *suite.reads)}
    for reader in readers.values():
        for key, part in reader.sections(sets.config.of(reader)).items():
            divided = getattr(part, "splits", "")
            if isinstance(part, LabelledConfig) and part.has_data() and not divided:
                train, test = sets.labelled(key, part)
                yield f"{key}.test", test, train
            elif isinstance(part, MaskedConfig) and part.has_data():
                train, test = sets.masked(key, part)
                yield f"{key}.test", test, train
            elif part.has_data():
                for name in part.required_sets:
                    if getattr(part, name):  # with split files, a set has no `test`
                        yield f"{key}.{name}", part.open(sets, key, name), None


def _shared(source: Source, other: Source | None) -> np.ndarray:
    """Mark the samples of a source whose picture or clip is in another source, too, [N]."""
    places = list(source.places())
    found = np.zeros(len(places), bool)
    if other is None or source.modality == "text":
        return found
    sizes, other_sizes = _sizes(source), _sizes(other)
    wanted = np.isin(sizes, other_sizes)
    if not wanted.any():
        return found
    hashes: dict[bytes, list[int]] = defaultdict(list)
    for number in np.flatnonzero(wanted).tolist():
        hashes[_hash(source, places[number])].append(number)
    there = np.isin(other_sizes, sizes[wanted])
    for number, place in enumerate(other.places()):
        if there[number]:
            found[hashes.get(_hash(other, place), [])] = True
    return found


def _sizes(source: Source) -> np.ndarray:
    """Return the number of bytes of each sample's picture or clip, [N]; -1 = it has none."""
    if isinstance(source, FileSource):
        return np.array([_file_size(item.path, item.column) for item in source.items], np.int64)
    found = [np.empty(0, np.int64)]
    for shard in range(len(source.manifest)):
        index, members = source.index(shard), source.members(shard)
        sizes = index.columns["sizes"][members]
        own = np.full(len(members), -1, np.int64)
        for ending in reversed(media_extensions(source.modality, source.animations)):
            if ending in index.extensions:
                column = sizes[:, index.extensions.index(ending)]
                own = np.where(column >= 0, column, own)
        found.append(own)
    return np.concatenate(found)


def _file_size(path: Any, column: str) -> int:
    try:
        return -1 if column else os.path.getsize(path)
    except OSError:
        return -1


def _hash(source: Source, place: tuple[int, int]) -> bytes:
    """Hash a picture or clip; an unreadable one has a hash of its own."""
    kind = source.modality, source.animations
    try:
        media = media_in(source.read(*place, media_extensions(*kind)), *kind)
    except (BadSample, OSError):
        return repr((id(source), place)).encode()
    return hashlib.sha256(media).digest()
