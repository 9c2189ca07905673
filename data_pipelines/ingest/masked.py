"""Evaluation sets of pictures with masks: shards, a folder of pictures and one of masks, a list."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.ingest.endings import ending_of
from data_pipelines.ingest.labelled import place_of
from data_pipelines.ingest.plain_files import FileSource, Request, source_of_files
from data_pipelines.ingest.user_data import kind_of, list_files, open_data
from data_pipelines.ingest.walk import walk
from data_pipelines.shards.source import Source
from xray.errors import BadSample, DataError

MASKS = ("png", "bmp", "tif", "tiff", "gif")  # endings of formats without loss
COLUMN = "mask"  # of a list


@dataclass(frozen=True)
class MaskNames:
    """Names by which the mask of a picture is found."""

    images: str  # folder of pictures in the folder of a set
    masks: str  # folder of masks beside it, with the same names
    ending: str  # of a mask in shards: KEY.ENDING


@dataclass(frozen=True)
class MaskedFiles(FileSource):
    """Pictures in files, each with the file of its mask, which is read as the ending `ending`."""

    masks: Sequence[Path] = field(default=(), repr=False)
    ending: str = ""

    def read(
        self, shard: int, member: int, extensions: Sequence[str] | None = None
    ) -> dict[str, bytes]:
        """Read a picture and its mask; raises BadSample for a missing file."""
        files = super().read(shard, member, extensions)
        if extensions is None or self.ending in extensions:
            try:
                files[self.ending] = self.masks[member].read_bytes()
            except OSError as error:
                raise BadSample("no mask", f"{self.masks[member]}: {error.strerror}") from error
        return files


def open_masked(key: str, pattern: str, root: str, names: MaskNames) -> Source:
    """Open a set of pictures with masks; raises DataError for a picture without one.

    Shards have KEY.jpg and KEY.ENDING. A folder has the folders `images` and `masks`, with files of
    equal names but for their endings; a folder within `images` is a part of such a set. A list has
    the columns `path` and `mask`, whose paths are relative to the list. key: of the config.
    """
    where, request = place_of(key, pattern, root), Request(key, "image")
    try:
        kind = kind_of(where, ("shards", "folder", "list"), "evaluation")
        if kind == "shards":
            source = open_data(where, request)
            _check_masks(source, names.ending)
            return source
        folder = where
        if kind == "folder":
            folder, masks = _folders(key, where, names)
        files = source_of_files(list_files(folder), folder, _place(folder), request)
        found = _listed(where, files) if kind == "list" else _beside(files, masks)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    return files.as_kind(MaskedFiles, masks=found, ending=names.ending)


def _place(where: str) -> str:
    return os.path.abspath(where if os.path.isdir(where) else os.path.dirname(where))


def _folders(key: str, where: str, names: MaskNames) -> tuple[str, str]:
    """Return the folders of a set's pictures and masks."""
    inside = os.path.join(where, names.images)
    if os.path.isdir(inside):
        return inside, os.path.join(where, names.masks)
    parts = os.path.abspath(where).split(os.sep)
    if names.images not in parts:
        section = key.rpartition(".")[0]
        raise DataError(
            f"{where} contains neither .tar shards nor a folder {names.images} of pictures: name "
            f"that folder in {section}.images, and the folder of masks in {section}.masks"
        )
    at = len(parts) - 1 - parts[::-1].index(names.images)
    return where, os.sep.join([*parts[:at], names.masks, *parts[at + 1 :]])


def _beside(files: FileSource, folder: str) -> list[Path]:
    """Return the mask of each picture: the file of the same name in the folder of masks."""
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder of masks {folder}")
    there: Mapping[str, str] = {
        os.path.splitext(name)[0]: name for name in walk(Path(folder)) if ending_of(name) in MASKS
    }
    missing = [key for key in files.keys() if key not in there]  # noqa: SIM118 - a method
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(files):,} pictures have no mask in {folder}, such as "
            f"{missing[0]}: remove them, or give a list with the columns path and {COLUMN}"
        )
    return [Path(folder, there[key]) for key in files.keys()]  # noqa: SIM118


def _listed(where: str, files: FileSource) -> list[Path]:
    """Return the mask of each picture: the file that its row names."""
    found = []
    for item in files.items:
        name = item.meta.get(COLUMN)
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}, data row {item.row}: {item.name} has no {COLUMN!r}")
        path = Path(_place(where), name)
        if not path.is_file():
            raise DataError(f"{where}, data row {item.row}: no file {path}")
        found.append(path)
    return found


def _check_masks(source: Source, ending: str) -> None:
    """Raise DataError if a picture of shards has no file of this ending."""
    for shard in range(len(source.manifest)):
        index, members = source.index(shard), source.members(shard)
        there = np.zeros(len(members), bool)
        if ending in index.extensions:
            there = index.columns["sizes"][members, index.extensions.index(ending)] >= 0
        if not there.all():
            key = index.key(int(members[np.flatnonzero(~there)[0]]))
            raise DataError(f"sample {key!r} of {index.path} has no mask {key}.{ending}")
