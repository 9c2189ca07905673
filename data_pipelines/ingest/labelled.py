"""Plain files as a source: a folder of folders named after classes, and the rows of a CSV.

A source of these is one shard that was never packed: a sample's files are its picture or clip, its
class number as `cls` and its captions as `json`, so that whatever reads samples reads them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.columns import pack_texts
from data_pipelines.shards.manifest import COUNTED, Manifest, resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import Source, open_source
from data_pipelines.shards.tar_index import Modality, ShardIndex, media_extensions
from data_pipelines.text.captions import metadata_of
from xray.errors import DataError


@dataclass(frozen=True)
class FileRow:
    """A picture or clip, its class number (-1 = none) and its captions."""

    path: str
    label: int = -1
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileSource(Source):
    """Files where they lie."""

    rows: Sequence[FileRow] = field(default=(), repr=False)

    def _open(self, shard: int) -> tuple[ShardIndex, np.ndarray]:
        folder = Path(self.manifest.path(shard))
        base = folder if folder.is_dir() else folder.parent
        keys = [os.path.splitext(os.path.relpath(row.path, base))[0] for row in self.rows]
        blob, ends = pack_texts(keys)
        facts = {"extensions": [], "digest": self.manifest.digest}
        index = ShardIndex(str(folder), {"keys": blob, "key_ends": ends}, facts)
        return index, np.arange(len(self.rows))

    def read(
        self, shard: int, member: int, extensions: Sequence[str] | None = None
    ) -> dict[str, bytes]:
        """The files of one row; raises DataError for one that is gone."""
        row = self.rows[member]
        files = {}
        if row.label >= 0:
            files["cls"] = str(row.label).encode()
        if row.captions:
            files["json"] = json.dumps({"captions": row.captions}).encode()
        ending = _ending(row.path)
        if extensions is None or ending in extensions:
            try:
                files[ending] = Path(row.path).read_bytes()
            except OSError as error:
                raise DataError(f"{row.path} cannot be read: {error.strerror}") from error
        return {e: v for e, v in files.items() if extensions is None or e in extensions}


@dataclass(frozen=True)
class NamedSource(Source):
    """Shards whose json field `label_name` or `label` is text: a class's name, numbered here."""

    def read(
        self, shard: int, member: int, extensions: Sequence[str] | None = None
    ) -> dict[str, bytes]:
        """The files of one member, with its class number as `cls`."""
        files = super().read(shard, member, extensions)
        name, _ = _class_of(files)
        if not name:
            return files
        return files | {"cls": str(self.classes.index(name) if self.classes else name).encode()}


def _class_of(files: dict[str, bytes]) -> tuple[str, int]:
    """The class's name, as it is said, and number; "" where the json has no name, or is broken."""
    try:
        facts = metadata_of(files)
    except BadSample:
        return "", 0
    label = facts.get("label")
    names = (facts.get("label_name"), label)
    name = next((name.replace("_", " ") for name in names if isinstance(name, str)), "")
    return name, label if isinstance(label, int) else 0


def open_labelled(
    name: str, pattern: str, modality: Modality, root: str = "", animations: Modality = "image"
) -> Source:
    """Shards, an image folder or a CSV as a source; raises DataError for none of them.

    An image folder (torchvision's ImageFolder) is FOLDER/CLASS/**/*.jpg, classes by their sorted
    names. A CSV has a header with `path` (relative to the CSV) and `label`, `caption` or both;
    rows of the same path are captions of one sample. Labels that are all numbers are class numbers;
    names are numbered in sorted order, also those in the json of shards (`label_name`, or a `label`
    that is text), unless these come with numbers of their own, whose order they take.
    """
    where = resolve(pattern, root)
    if where.endswith(".csv") and not is_remote(where):
        return _source(name, Path(where), modality, animations, *_read_csv(where, modality))
    if not is_remote(where) and os.path.isdir(where):
        with os.scandir(where) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        if not any(item.endswith(".tar") for item in names):
            classes = [item for item in names if os.path.isdir(os.path.join(where, item))]
            rows = _read_folder(where, classes, media_extensions(modality, animations), modality)
            return _source(name, Path(where), modality, animations, rows, classes)
    source = open_source(name, pattern, modality, root, animations)
    first = source.read(*next(source.places()), ("cls", "json"))
    if "cls" in first or not _class_of(first)[0]:
        return source
    found = dict(_class_of(source.read(*place, ("json",))) for place in source.places())
    found.pop("", None)
    kind = source.name, source.modality, source.animations, source.manifest, source.cache
    if all(name.isdecimal() for name in found):
        return NamedSource(*kind)
    return NamedSource(*kind, classes=tuple(sorted(found, key=lambda name: (found[name], name))))


def _read_folder(
    where: str, classes: Sequence[str], endings: Sequence[str], modality: Modality
) -> list[FileRow]:
    if not classes:
        raise DataError(
            f"{where} has no class names: it holds neither .tar shards nor a folder per class "
            "(xray data pack makes shards of files with captions beside them)"
        )
    rows = []
    for number, own in enumerate(classes):
        folder = Path(where) / own
        paths = sorted(str(p) for p in folder.rglob("*") if _ending(p) in endings and p.is_file())
        if not paths:
            raise DataError(
                f"{folder} has no {modality} files: remove this class, fill it, or say modality="
                f"{'video' if modality == 'image' else 'image'} of this set"
            )
        rows += [FileRow(path, number) for path in paths]
    return rows


def _read_csv(where: str, modality: Modality) -> tuple[list[FileRow], list[str]]:
    """The samples in order of their first row, and the names of the classes."""
    labels: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    try:
        text = Path(where).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns, lines = reader.fieldnames or [], [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{where}, line {reader.line_num}: {error}: is a quote open?") from error
    if "path" not in columns or not {"label", "caption"} & set(columns):
        raise DataError(f"{where} must begin with a line `path,label` or `path,caption`")
    for number, row in lines:
        place = f"{where}, row {number}"
        if None in row:
            raise DataError(f"{place} has more cells than columns: quote what holds a comma")
        path = _existing(where, row["path"], place, media_extensions(modality, "image"))
        own = captions.setdefault(path, [])
        if "caption" in columns:
            own.append(_cell(row["caption"], "caption", place))
        if "label" in columns:
            label = _cell(row["label"], "label", place)
            if labels.setdefault(path, label) != label:
                raise DataError(f"{place}: {row['path']} is {label!r}, and {labels[path]!r} too")
    if not captions:
        raise DataError(f"{where} has no rows below its header")
    named = sorted(set(labels.values()))
    numbers = {label: number for number, label in enumerate(named)}
    if all(label.isdecimal() for label in named):
        numbers, named = {label: int(label) for label in named}, []
    rows = [
        FileRow(path, numbers[labels[path]] if labels else -1, tuple(own))
        for path, own in captions.items()
    ]
    return rows, named


def _existing(where: str, path: str, place: str, endings: Sequence[str]) -> str:
    """The file of a row; raises DataError where there is none, or one of another kind."""
    found = os.path.join(os.path.dirname(where), _cell(path, "path", place))
    if not os.path.isfile(found):
        raise DataError(f"{place}: no file {found}")
    if _ending(found) not in endings:
        raise DataError(f"{place}: {path} is none of {', '.join(endings)}")
    return found


def _cell(value: str | None, column: str, place: str) -> str:
    if not (value or "").strip():
        raise DataError(f"{place}: {column} is empty")
    return str(value).strip()


def _ending(path: str | Path) -> str:
    return os.path.splitext(str(path))[1][1:].lower()


def _source(
    name: str,
    where: Path,
    modality: Modality,
    animations: Modality,
    rows: Sequence[FileRow],
    classes: Iterable[str],
) -> FileSource:
    state = hashlib.sha256()
    sizes = [os.stat(row.path).st_size for row in rows]
    for row, size in zip(rows, sizes, strict=True):
        state.update(f"{os.path.basename(row.path)}\0{size}\0{row}\0".encode())
    blob, ends = pack_texts([where.name])
    columns = {
        "names": blob,
        "name_ends": ends,
        "sizes": np.array([sum(sizes)]),
        "mtimes": np.zeros(1, np.int64),
        "counts": np.full((1, len(COUNTED)), len(rows), np.int32),
        "digests": np.frombuffer(state.digest(), np.uint8)[None],
        "sha256": np.zeros((1, 32), np.uint8),
    }
    manifest = Manifest(str(where.parent), columns, {"digest": state.hexdigest()})
    return FileSource(
        name, modality, animations, manifest, rows=tuple(rows), classes=spaced(classes)
    )


def spaced(classes: Iterable[str]) -> tuple[str, ...]:
    """Names as they are said in prompts."""
    return tuple(name.replace("_", " ") for name in classes)
