"""Lists the pictures and clips of a folder or a table, with their captions and metadata.

A table has a column of files (`table_columns`). Rows with the same path that differ only in their
captions become one sample with all captions. Folders have one of these forms:

sidecars        a.jpg a.txt a.json, also a.caption, a.jpg.txt and a.jpg.json
class folders   cat/1.jpg dog/1.jpg, where no file has a sidecar
imagefolder     metadata.csv, .jsonl or .parquet in the folder, or one per split
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipelines.ingest.clip_lists import SENTENCE, is_clip_list, with_clips
from data_pipelines.ingest.endings import MEDIA, ending_of
from data_pipelines.ingest.parquet_tables import Cell, read_cell
from data_pipelines.ingest.row_captions import (
    captions_in,
    captions_with_languages,
    check_captions,
    texts_in,
)
from data_pipelines.ingest.table_columns import (
    CAPTION_COLUMNS,
    Row,
    TableKeys,
    file_column,
    with_captions,
)
from data_pipelines.ingest.tables import parse_object, read_table
from data_pipelines.ingest.walk import walk
from data_pipelines.shards.tar_contents import compressed, is_compressed_tar
from data_pipelines.shards.tar_index import VIDEO_EXTENSIONS
from data_pipelines.text.captions import LANGUAGE_FIELDS, language_of
from xray.errors import BadSample, ConfigError, DataError
from xray.files import decode_text, is_system_name, lines_of

log = logging.getLogger("xray")
FIRST_ROWS = 100  # of a table, which are looked for beside it


@dataclass(frozen=True)
class Item:
    """A picture or clip: its path, its name relative to the input, its metadata and sidecars."""

    path: Path
    name: str
    meta: Row = field(default_factory=dict)
    sidecars: tuple[Path, ...] = ()
    listed: bool = True  # False: no row of its folder's metadata file names it
    row: int = 0  # number of its row in a list or a metadata file; 0 = no row
    column: str = ""  # of the parquet table at `path` that holds the file; "" = a file at `path`
    empty: int = 0  # number of its rows whose caption is empty, in a table with captions
    optional: bool = False  # may be missing: a clip of a data set that is fetched clip by clip

    def stamp(self) -> str:
        """Return a line that changes when the file, its sidecars or its metadata change."""
        states = [_state(path) for path in (self.path, *self.sidecars)]
        return json.dumps([self.name, self.meta, states], default=str)

    def with_captions(self, captions: Sequence[Any]) -> Item:
        """Return this item with these captions instead of those of its metadata.

        captions: texts, or objects {text, language}, which replace the metadata's language, too.
        """
        replaced = {*CAPTION_COLUMNS}
        if any(isinstance(caption, dict) for caption in captions):
            replaced |= {*LANGUAGE_FIELDS}
        rest = {key: value for key, value in self.meta.items() if key not in replaced}
        return replace(self, meta={**rest, "captions": list(captions)})

    def read(self) -> bytes:
        """Read the picture or clip; raises BadSample if it is missing or cannot be read."""
        return read_cell(self.path, self.column, self.row - 1) if self.column else _read(self.path)

    def describe(self) -> tuple[list[str], Row]:
        """Read captions and metadata, sidecars included.

        Raises BadSample for broken json, for text of another encoding, and for a caption that is
        not text.
        """
        meta, captions = dict(self.meta), list[str]()
        for path in self.sidecars:
            try:
                text = decode_text(_read(path))
            except BadSample as error:
                raise BadSample(error.cause, f"{path.name}: {error.detail}") from error
            except ValueError as error:
                raise BadSample("not UTF-8", f"{path.name} {error}") from error
            if path.suffix.lower() == ".json":
                try:
                    meta |= parse_object(text)
                except ValueError as error:
                    raise BadSample("broken json", f"{path.name} is {error}") from error
            else:
                captions = texts_in(lines_of(text))
        check_captions(meta)
        if captions:  # of a text file, which go before those of the metadata
            meta.pop("captions", None)
        captions = captions or captions_in(meta)
        # The json files of some photo services have the name of the file as their title.
        captions = [text for text in captions if text != posixpath.basename(self.name)]
        if any("\0" in text for text in captions):
            raise BadSample("broken caption", "it has NUL characters")
        return captions, meta


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        cause = "unreadable file" if os.path.isfile(path) else "missing file"
        detail = error.strerror if isinstance(error, OSError) else None
        raise BadSample(cause, detail or str(error)) from error


def _state(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return [status.st_size, status.st_mtime_ns]


def list_table(where: str, keys: TableKeys) -> list[Item]:
    """Return the files that a table names; relative paths start at `keys.root`, or at the table's
    folder, or at a folder beside the table in which they are.
    """
    path = Path(where).absolute()
    if not keys.root:
        return rows_of_table(path, path.parent, None, keys)
    root = Path(os.path.expanduser(keys.root)).absolute()
    if not root.is_dir():
        raise ConfigError(f"root={keys.root} is not a folder")
    return rows_of_table(path, root, "", keys)


def rows_of_table(path: Path, root: Path, folder: str | None, keys: TableKeys) -> list[Item]:
    """Return the files of a table's rows.

    Paths are relative to `folder`, which is relative to `root`; None: the root, or a folder in it.
    Raises DataError for a table that cannot be read or has no column of files, ConfigError for
    keys that do not fit.
    """
    rows, caption_key = read_table(path, keys), keys.caption_key
    if clips := not keys.image_key and is_clip_list(rows):
        folder = ""
        root, rows = with_clips(path, root, rows)
        caption_key = caption_key or (SENTENCE if SENTENCE in rows[0] else "")
    held = [column for column, value in rows[0].items() if isinstance(value, Cell)]
    column = file_column(path, rows, keys.image_key, held)
    rows = with_captions(path, rows, caption_key)
    captioned = any(captions_in(row) for row in rows)
    if folder is None:
        folder = folder_of(path, root, [row.get(column) for row in rows[:FIRST_ROWS]])
    items = []
    for number, row in enumerate(rows, start=1):
        name, empty = row.pop(column, None), int(captioned and not captions_in(row))
        if isinstance(name, Cell):
            inner = posixpath.normpath(f"/{name.name}")  # absolute, so that it cannot lead outside
            own = posixpath.join(folder, path.name + inner)
            items.append(Item(path, own, row, row=number, column=name.column, empty=empty))
            continue
        if name is not None and not isinstance(name, str):
            raise DataError(
                f"{path}, data row {number}: column {column!r} must hold the path of a file, not "
                f"a value of type {type(name).__name__}"
            )
        name = posixpath.normpath(posixpath.join(folder, name or f"(row {number} names no file)"))
        if name.startswith(f"{root.as_posix()}/"):
            name = Path(name).relative_to(root).as_posix()
        items.append(Item(root / name, name, row, row=number, empty=empty, optional=clips))
    return _joined(items)


def folder_of(path: Path, root: Path, names: Sequence[Any]) -> str:
    """Return the folder in `root` that has the files of a table, "" for the root itself.

    Flickr8k and Flickr30k have their pictures in such a folder beside the table.
    """
    wanted = [name for name in names if isinstance(name, str) and name]

    def has_one(folder: str) -> bool:
        return any(os.path.exists(root / folder / name) for name in wanted)

    if not wanted or has_one(""):
        return ""
    beside = sorted(own.name for own in os.scandir(root) if not is_system_name(own.name))
    found = next((own for own in beside if (root / own).is_dir() and has_one(own)), "")
    if found:
        log.info("%s: its files are in %s", path, root / found)
    return found


def _joined(items: list[Item]) -> list[Item]:
    """Merge the rows of a file that differ only in their caption; the first row sets the order.

    Captions in other languages are other samples in packing and training: only evaluation merges
    all rows of a file.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        rest = {key: value for key, value in item.meta.items() if key not in CAPTION_COLUMNS}
        groups.setdefault(json.dumps([item.name, rest], default=str), []).append(item)
    joined = []
    for group in groups.values():
        first = replace(group[0], empty=sum(item.empty for item in group))
        unique = {json.dumps(caption): caption for caption in merged_captions(group)}
        joined.append(first.with_captions([*unique.values()]) if len(group) > 1 else first)
    return joined


def merged_captions(rows: Sequence[Item]) -> list[Any]:
    """Return the captions of several rows of a file.

    They are texts if all have the language of the first row's metadata, or none is known, and
    otherwise {text, language} where it is known.
    """
    found = [caption for row in rows for caption in captions_with_languages(row.meta)]
    language = str(language_of(rows[0].meta))
    if all(isinstance(caption, dict) and caption["language"] == language for caption in found):
        return [caption["text"] for caption in found]
    return found


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def list_folder(where: str, keys: TableKeys) -> list[Item]:
    """Return the pictures and clips below a folder, sorted; raises DataError for .tar shards,
    ConfigError for keys of a table in a folder without one.
    """
    root = Path(where).absolute()
    names = sorted(walk(root))
    tars = [name for name in names if name.endswith(".tar")]
    if tars:
        raise DataError(
            f"{where} contains .tar shards below it, such as {tars[0]}: give their folder, or a "
            f"pattern such as '{where}/*/*.tar'"
        )
    tables = _tables_in(names)
    media = [name for name in names if ending_of(name) in MEDIA]
    if not media and not tables:
        if packed := [name for name in names if is_compressed_tar(name)]:
            raise DataError(compressed(f"{where}/{packed[0]}"))
        raise DataError(f"{where} contains neither .tar shards nor pictures or clips")
    if (given := keys.given()) and (keys.root or not tables):
        raise ConfigError(f"{given[0]} is for a table of files, and {where} is a folder")
    if tables:
        rows = [rows_of_table(root / name, root, posixpath.dirname(name), keys) for name in tables]
        items = [item for table in rows for item in table]
        named = {item.name for item in items}
        others = [name for name in media if name not in named]
        return items + [Item(root / name, name, listed=False) for name in others]
    beside = {_folded(name): name for name in reversed(names)}  # the first of several spellings
    beside |= {name: name for name in names}
    items = [Item(root / name, name, {}, _sidecars(root, name, beside)) for name in media]
    if any(item.sidecars for item in items):
        return items
    labels = _class_labels(media)
    return [replace(item, meta=labels.get(item.name, {})) for item in items]


def _tables_in(names: Iterable[str]) -> list[str]:
    """Return the metadata files that are read: in a folder, .csv before .jsonl before .parquet."""
    tables: dict[str, str] = {}
    for name in names:
        folder, base = posixpath.split(name)
        if base in METADATA:
            tables.setdefault(folder, name)
    return [*tables.values()]


def _class_labels(names: Sequence[str]) -> dict[str, Row]:
    """Return the labels of the files in class folders.

    Folders are classes of pictures if they divide the pictures, and of clips if they divide the
    clips: a single folder of clips beside folders of pictures is no class.
    """
    folders: dict[bool, set[str]] = {True: set(), False: set()}
    inside = [name for name in names if name.count("/") == 1]
    for name in inside:
        folders[_is_clip(name)].add(posixpath.dirname(name))
    own = [name for name in inside if len(folders[_is_clip(name)]) > 1]
    classes = sorted({posixpath.dirname(name) for name in own})
    numbers = {name: number for number, name in enumerate(classes)}
    labels = ((name, posixpath.dirname(name)) for name in own)
    return {name: {"label_name": own, "label": numbers[own]} for name, own in labels}


def _is_clip(name: str) -> bool:
    return ending_of(name) in VIDEO_EXTENSIONS


def _folded(name: str) -> str:
    """Return a name with its ending in lower case."""
    stem, ending = posixpath.splitext(name)
    return stem + ending.lower()


def _sidecars(root: Path, name: str, beside: Mapping[str, str]) -> tuple[Path, ...]:
    """Return a file's sidecars: the first that exists of those for json, and of those for text."""
    stem = posixpath.splitext(name)[0]
    kinds = ((".json",), (".txt", ".caption"))
    found = []
    for endings in kinds:
        names = (base + ending for base in (stem, name) for ending in endings)
        found += [root / beside[own] for own in names if own in beside][:1]
    return tuple(found)


def unread_files(where: str, items: Iterable[Item]) -> list[str]:
    """Return the files of a folder, or beside a list's files, that are neither media nor read."""
    read = {os.path.normpath(path) for item in items for path in (item.path, *item.sidecars)}
    root = Path(where).absolute()
    if root.is_dir():
        names = sorted(walk(root))
        read |= {os.path.normpath(root / name) for name in _tables_in(names)}
    else:
        folders = sorted({os.path.dirname(path) for path in read if os.path.isfile(path)})
        read.add(str(root))
        paths = (entry for folder in folders for entry in sorted(Path(folder).iterdir()))
        beside = [path for path in paths if not is_system_name(path.name) and path.is_file()]
        root, names = root.parent, [os.path.relpath(path, root.parent) for path in beside]
    return [name for name in names if os.path.normpath(root / name) not in read]
