"""Evaluation sets from the samples that the sources of a run hold out, in the folder `val`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from data_pipelines.ingest.held_out import VAL
from data_pipelines.ingest.labelled import class_of
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.shard_list import tars_in
from data_pipelines.shards.source import Source, open_source
from data_pipelines.text.captions import metadata_of
from xray.artifacts.artifact import Artifact
from xray.artifacts.manifest_config import head_section, read_section, training_blocks
from xray.artifacts.offers import TAGS as TAGS_OFFERED
from xray.config import DataConfig, SourceConfig
from xray.errors import BadSample, DataError
from xray.evaluation.config import EvalConfig
from xray.evaluation.feature_extraction import read_all_captions
from xray.evaluation.suite import LabelledConfig, SuiteConfig
from xray.evaluation.suites.knn import KNN
from xray.evaluation.suites.tagging import TAGS, TaggingConfig
from xray.words import count

MOST_TRAINED = 100_000  # training samples of kNN and the linear probe, which encode all of them


@dataclass(frozen=True)
class TaggedSources:
    """Names of the sources whose tags a run learns, and the json field of the tags."""

    names: frozenset[str] = frozenset()
    field: str = "hashtags"


def located(data: DataConfig, name: str) -> SourceConfig:
    """Return a source whose shards do not depend on data.root."""
    source = data.sources[name]
    where = resolve(source.shards, data.root)
    return replace(source, shards=where if is_remote(where) else os.path.abspath(where))


def trained_sources(artifact: Artifact, root: str) -> tuple[dict[str, SourceConfig], TaggedSources]:
    """Return the sources that an artifact trained on; root: replaces its data.root, if not ""."""
    data = read_section(DataConfig, artifact, "data")
    data = replace(data, root=root or data.root)
    data.sources = {block.source: source for block, source in training_blocks(artifact)}
    sources = {name: located(data, name) for name in data.sources}
    if TAGS_OFFERED not in artifact.offers:
        return sources, TaggedSources()
    field = head_section(artifact, TAGS_OFFERED).get("field", "hashtags")
    return sources, TaggedSources(frozenset(sources), str(field))


@dataclass(frozen=True)
class HeldOut:
    """Samples that a source, which was `located`, holds out."""

    name: str
    config: SourceConfig

    @property
    def where(self) -> str:
        """Shards of the source itself."""
        return self.config.shards

    @cached_property
    def folder(self) -> str:
        """Folder of the samples; "" if the source holds none out."""
        if is_remote(self.where):
            return ""
        folder = self.where if os.path.isdir(self.where) else os.path.dirname(self.where)
        val = os.path.abspath(os.path.join(folder, VAL))
        return val if os.path.isdir(val) and tars_in(val) else ""

    @cached_property
    def source(self) -> Source:
        """The samples, opened."""
        return self._open(self.folder)

    @cached_property
    def captions(self) -> list[list[str]]:
        """Captions of each sample."""
        return read_all_captions(self.source, self.config.captions)

    @cached_property
    def classes(self) -> list[str]:
        """Class of each sample, "" for none."""
        return _classes(self.source)

    def _open(self, where: str) -> Source:
        return open_source(self.name, where, self.config.modality, "", self.config.animations)

    def sections(self, neighbours: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (suite, settings) of the suites that these samples have the fields for.

        neighbours: of kNN, which needs as many training samples.
        """
        sets = {"shards": self.folder, "modality": self.config.modality}
        captioned = {**sets, "captions": self.config.captions}
        if any(len(own) > 1 for own in self.captions):
            yield "captions", captioned
        if self.config.modality == "text" or len(self.source) < 2:
            return
        if sum(map(bool, self.captions)) > 1:
            yield "retrieval" if self.config.modality == "image" else "video_retrieval", captioned
        if not all(self.classes) or len({*self.classes}) < 2:
            return
        if not all(name.isdecimal() for name in self.classes):
            yield "zero_shot", sets
        trained = self._open(self.where)
        if len(trained) <= MOST_TRAINED:
            known = _classes(trained)
            if all(known) and {*self.classes} <= {*known}:
                probe = {"train": self.where, "test": self.folder, "modality": self.config.modality}
                yield "linear_probe", probe
                if len(trained) >= neighbours:
                    yield "knn", probe

    def has_tags(self, field: str) -> bool:
        """Check if any sample has something that its tags are read from."""
        if self.config.tags != "hashtags":
            return any(self.captions)
        return any(meta.get(field) for meta in _metas(self.source))


def with_held_out(
    config: EvalConfig, sources: Mapping[str, SourceConfig], tagged: TaggedSources
) -> tuple[EvalConfig, list[str]]:
    """Fill the data sets that are not set with those that `located` sources hold out.

    Returns also lines that say what is evaluated, or how to hold samples out. The first source that
    fits a suite fills it. A suite with any data set of the user's is left as it is.
    """
    if not config.held_out:
        return config, []
    found = [HeldOut(name, own) for name, own in sources.items()]
    there, fitting = [held for held in found if held.folder], dict[str, list[str]]()
    if not there:
        return config, [] if config.configured() or config.sets else [_advice(found)]
    filled: dict[str, Any] = {}
    lines = list[str]()
    for held in [*there]:
        try:
            sections = [*held.sections(config.of(KNN).k)]
        except DataError as error:
            there.remove(held)
            lines.append(f"the samples held out of {held.name} are not used: {error}")
            continue
        fitting[held.name] = [suite for suite, _ in sections]
        for suite, settings in sections:
            section = getattr(config, suite)
            if suite not in filled and not section.sets():
                filled[suite] = _with(section, settings)
    own = {h.name: h for h in there if h.name in tagged.names and h.has_tags(tagged.field)}
    for name in own:
        fitting[name].append("tags")
    if not config.of(TAGS):
        filled["tags"] = {
            name: TaggingConfig(
                shards=held.folder,
                modality="video" if held.config.modality == "video" else "image",
                tags=held.config.tags,
                field=tagged.field,
                captions=held.config.captions,
            )
            for name, held in own.items()
        }
    return replace(config, **filled), [*lines, *_lines(there, fitting, filled)]  # type: ignore[type-var]


def _with(section: SuiteConfig, settings: Mapping[str, Any]) -> SuiteConfig:
    """Return a suite's section with data sets; captions that the user set stay."""
    if getattr(section, "captions", None):
        settings = {**settings, "captions": section.captions}  # type: ignore[attr-defined]
    return replace(section, **settings)


def _lines(
    there: list[HeldOut], fitting: Mapping[str, list[str]], filled: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a line on each source; fitting: suites that its samples fit, by its name."""
    for held in there:
        suites = [suite for suite, section in filled.items() if held.folder in _places(section)]
        what = ", ".join(suites)
        if not what and fitting[held.name]:
            what = f"nothing: the data of {', '.join(fitting[held.name])} are set already"
        elif not what:
            what = "nothing: they have neither captions, tags nor classes for it"
        line = f"{count(len(held.source), 'sample')} held out of {held.name} evaluate {what}"
        without = sum(not own for own in held.captions)
        if 0 < without < len(held.source):
            line += f"; captions leave out {count(without, 'sample')} without any"
        yield line


def _places(section: Any) -> set[str]:
    parts = section.values() if isinstance(section, dict) else [section]
    return {p.test if isinstance(p, LabelledConfig) else p.shards for p in parts}


def _advice(found: list[HeldOut]) -> str:
    if not found:
        return (
            "eval.held_out=true evaluates nothing: the artifact names no sources that it was "
            "trained on. Set eval.SUITE.shards"
        )
    first = found[0]
    folder = first.where if os.path.isdir(first.where) else os.path.dirname(first.where)
    out = f"{folder.rstrip('/')}_split"
    return (
        "no source holds samples out in a folder val, so nothing is evaluated: pack with val=0.05, "
        f"or run xray data split {shlex.quote(first.where)} {shlex.quote(out)} val=0.05 and set "
        f"data.sources.{first.name}.shards={shlex.quote(out)}"
    )


def _classes(source: Source) -> list[str]:
    return [class_of(source.read(*place, ("cls", "json"))) for place in source.places()]


def _metas(source: Source) -> Iterator[dict[str, Any]]:
    for place in source.places():
        try:
            yield metadata_of(source.read(*place, ("json",)))
        except BadSample:
            yield {}
