"""Evaluation sets: shards, a folder or a list, whose samples have class numbers."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from data_pipelines.ingest.clip_lists import tell_missing
from data_pipelines.ingest.endings import by_ending, ending_of
from data_pipelines.ingest.listing import Item, merged_captions
from data_pipelines.ingest.plain_files import FileSource, Request, source_of_files
from data_pipelines.ingest.row_captions import captions_in, texts_in
from data_pipelines.ingest.table_columns import CAPTION_COLUMNS, LABELS
from data_pipelines.ingest.tables import whole_number
from data_pipelines.ingest.user_data import (
    is_pattern,
    kind_of,
    list_files,
    open_data,
    shards_beside,
)
from data_pipelines.ingest.walk import is_folder, loops
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.shard_list import find_shards
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import Modality, media_extensions
from data_pipelines.text.captions import metadata_of
from xray.errors import BadSample, DataError
from xray.files import is_system_name
from xray.words import count

log = logging.getLogger("xray")


class _Named:
    """Mixin of sources with class names in json; a class's number is its position in `classes`."""

    classes: tuple[str, ...]

    def read(
        self, shard: int, member: int, extensions: Sequence[str] | None = None
    ) -> dict[str, bytes]:
        """Read the files of one member, with its class number as `cls`."""
        files: dict[str, bytes] = super().read(shard, member, extensions)  # type: ignore[misc]
        name, _ = _class_of(files)
        if not name:
            return files
        return files | {"cls": str(self.classes.index(name) if self.classes else name).encode()}


@dataclass(frozen=True)
class NamedSource(_Named, Source):
    """Shards whose json field `label_name` or `label` is the name of a class."""


@dataclass(frozen=True)
class NamedFiles(_Named, FileSource):
    """Plain files with the names of their classes."""


def _class_of(files: dict[str, bytes]) -> tuple[str, int]:
    """Return (class name in the form for prompts, class number); "" if json has no name."""
    try:
        facts = metadata_of(files)
    except BadSample:
        return "", 0
    label = whole_number(facts.get("label"))
    names = (facts.get(field) for field in LABELS)
    name = next((name.replace("_", " ") for name in names if isinstance(name, str) and name), "")
    return name.strip(), label if isinstance(label, int) else 0


def class_of(files: dict[str, bytes]) -> str:
    """Return the name of a sample's class, or its number; "" if it has none."""
    if name := _class_of(files)[0]:
        return name
    if "cls" in files:
        return files["cls"].decode("utf-8", "replace").strip()
    return str(metadata_of(files)["label"]) if _has_class(files) else ""


def _has_class(files: dict[str, bytes]) -> bool:
    """Return True if a sample has the name or the number (from 0) of a class."""
    try:
        number = whole_number(metadata_of(files).get("label"))
    except BadSample:
        number = None
    numbered = isinstance(number, int) and number >= 0
    return "cls" in files or numbered or bool(_class_of(files)[0])


def open_labelled(
    name: str, pattern: str, modality: Modality, root: str = "", captions: Iterable[str] = ()
) -> Source:
    """Open shards, a folder or a list as an evaluation set; raises DataError for other data.

    Class folders (torchvision's ImageFolder) are FOLDER/CLASS/**/*.jpg, numbered by their sorted
    names. A list has columns `label`, `caption` or both beside its paths. Labels that are numbers
    are class numbers. Class names are numbered in sorted order, also those in the json of shards
    (`label_name`, or a `label` that is text). If there are numbers beside the names, these give the
    order. captions: columns of a list that have captions or tags, beside the usual ones.
    """
    where, request = place_of(name, pattern, root), Request(name, modality)
    try:
        kind = kind_of(where, ("shards", "folder", "list"), "evaluation")
        if kind == "shards":
            source = open_data(where, request)
        else:
            listed = _there(f"{name}={where}", list_files(where))
            if kind == "list":
                items = _checked_rows(where, listed, modality, tuple(captions))
            else:
                items = _with_classes(where, listed, modality)
            place = where if kind == "folder" else os.path.dirname(where)
            files = source_of_files(items, where, os.path.abspath(place), request)
            _report_unused(f"{name}={where}", listed, files)
            source = files
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return _numbered(source)


def place_of(key: str, pattern: str, root: str) -> str:
    """Return the place of a relative path of an evaluation: in data.root, if that is set.

    If it does not exist there, it is in the shards that were packed from data.root, or else in the
    working folder. key: for the line that says which one is used if there are both.
    """
    where, here = resolve(pattern, root), resolve(pattern)
    if not root or where == here or is_remote(where):
        return where
    if not data_exists(where):
        packed = resolve(pattern, shards_beside(os.path.expanduser(root)))
        return next(filter(data_exists, (packed, here)), where)
    if not data_exists(here):
        return where
    if os.path.realpath(where) != os.path.realpath(here):
        _tell_of_both(key, where, os.path.abspath(here))
    return where


@functools.cache
def _tell_of_both(key: str, where: str, other: str) -> None:
    log.info("%s: %s in data.root is used, not %s in the working folder", key, where, other)


def data_exists(where: str) -> bool:
    """Return True for a path that exists, or a pattern of shards that do."""
    if os.path.exists(where):
        return True
    with suppress(DataError):
        return is_pattern(where) and bool(find_shards(where))
    return False


def _there(what: str, items: list[Item]) -> list[Item]:
    """Leave out clips that may be missing, and are, with a line that counts them.

    A list of MSR-VTT with videos of several splits is evaluated on those of its split `test`.
    """
    clips = [item for item in items if item.optional]
    splits = {item.meta.get("split") for item in clips if "video_id" in item.meta}
    if len(splits) > 1 and "test" in splits:
        tested = [item for item in items if item.meta.get("split") == "test"]
        of = count(len(items), "clip")
        log.info("%s: those of the split test are used, %s of %s", what, f"{len(tested):,}", of)
        items = tested
    missing = {item.name for item in items if item.optional and not item.path.is_file()}
    if items and len(missing) == len(items):
        raise DataError(f"none of the {count(len(items), 'listed clip')} is there")
    tell_missing(what, sorted(missing), len(items))
    return [item for item in items if item.name not in missing]


def _report_unused(what: str, items: Iterable[Item], source: FileSource) -> None:
    """Log which pictures and clips of a folder are not in an evaluation set."""
    used = {item.name for item in source.items}
    if unused := [item.name for item in items if item.listed and item.name not in used]:
        log.warning("%s: not used as %s: %s", what, source.modality, by_ending(unused))


def _numbered(source: Source) -> Source:
    """Number the names of classes, unless the first sample with a class has only a number.

    Raises DataError if some samples have names and others only numbers.
    """
    samples = (source.read(*place, ("cls", "json")) for place in source.places())
    first = next(filter(_has_class, samples), {})
    if "cls" in first or not _class_of(first)[0]:
        return source
    names: dict[str, int] = {}
    for place in source.places():
        files = source.read(*place, ("cls", "json"))
        name, number = _class_of(files)
        if name:
            names[name] = number
        elif _has_class(files):
            key = source.index(place[0]).key(place[1])
            raise DataError(f"{source.name}: the class of {key} is a number, and others have names")
    known = {}
    if not all(name.isdecimal() for name in names):
        known["classes"] = tuple(sorted(names, key=lambda name: (names[name], name)))
    return source.as_kind(NamedFiles if isinstance(source, FileSource) else NamedSource, **known)


def _with_classes(where: str, items: list[Item], modality: Modality) -> list[Item]:
    """Label the files of class folders, and return them in the order of the classes.

    A folder with metadata files, or with sidecars beside its own files, has no class folders.
    """
    captioned = any(item.sidecars for item in items if "/" not in item.name)
    if captioned or any(item.row for item in items):
        return items
    with os.scandir(where) as entries:
        folders = (entry for entry in entries if is_folder(entry) and not loops(entry))
        classes = sorted(entry.name for entry in folders if not is_system_name(entry.name))
    if not classes:
        raise DataError(
            f"{where} has no class names: it contains neither .tar shards, nor a folder per class, "
            "nor captions or labels beside its files"
        )
    alike = [name for name, times in Counter(spaced(classes)).items() if times > 1]
    if alike:
        log.warning("%s: folders are one class if only _ and spaces differ: %s", where, alike)
    members: dict[str, list[Item]] = defaultdict(list)
    endings = media_extensions(modality, "image")
    for item in items:
        if ending_of(item.name) in endings:
            members[item.name.partition("/")[0]].append(item)
    labelled: list[Item] = []
    for number, own in enumerate(classes):
        mine = members.get(own, [])
        if not mine:
            raise DataError(
                f"{os.path.join(where, own)} has no {modality} files: remove this class, fill it, "
                f"or set modality={'video' if modality == 'image' else 'image'} for this set"
            )
        labelled += [_labelled(item, own, number) for item in mine]
    return labelled


def _labelled(item: Item, name: str, number: int) -> Item:
    """Return a file of a class folder with its label and the captions of its sidecars."""
    meta: dict[str, Any] = {}
    if item.sidecars:
        with suppress(BadSample):
            captions, meta = item.describe()
            meta = {**meta, "captions": captions}
    return replace(item, meta={**meta, "label_name": name, "label": number}, sidecars=())


def _checked_rows(
    where: str, items: list[Item], modality: Modality, columns: Sequence[str]
) -> list[Item]:
    """Check the rows of a list and merge those of each file; raises DataError with the row.

    columns: of captions or tags, beside the usual ones.
    """
    labels = any(key in item.meta for item in items for key in LABELS)
    captioned = any(captions_in(item.meta) for item in items)
    if not (labels or captioned or any(item.meta.keys() & {*columns} for item in items)):
        raise DataError(f"{where} has neither a column `label` nor a column `caption`")
    endings = media_extensions(modality, "image")
    samples: dict[str, Item] = {}
    for item in items:
        place = f"{where}, data row {item.row}"
        if not item.path.is_file():
            raise DataError(f"{place}: no file {item.path}")
        if ending_of(item.name) not in endings:
            raise DataError(
                f"{place}: {item.name} is not of modality {modality}: its ending must "
                f"be {', '.join(endings)}"
            )
        texts, label = captions_in(item.meta), _label_of(item)
        if captioned and not texts:
            raise DataError(f"{place}: caption is empty")
        if labels and label == "":
            raise DataError(f"{place}: label is empty")
        first = samples.setdefault(item.name, item)
        if _label_of(first) != label:
            raise DataError(f"{place}: {item.name} is {label!r}, and {_label_of(first)!r} too")
        if first is not item:
            merged = merged_captions([first, item])
            other = [column for column in columns if column not in CAPTION_COLUMNS]
            both = {key: (first.meta.get(key), item.meta.get(key)) for key in other}
            own = {key: texts_in([*cells]) for key, cells in both.items() if cells[0] != cells[1]}
            first = replace(first, meta=first.meta | {key: own[key] for key in own if own[key]})
            samples[item.name] = first.with_captions(merged)
    return list(samples.values())


def _label_of(item: Item) -> Any:
    """Return the label that a row gives its file, "" for none."""
    given = (item.meta.get(column) for column in LABELS)
    return next((label for label in given if label not in (None, "")), "")


def spaced(classes: Iterable[str]) -> tuple[str, ...]:
    """Return class names for prompts: underscores become spaces."""
    return tuple(name.replace("_", " ") for name in classes)
