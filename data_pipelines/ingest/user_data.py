"""Entry point to a user's data: finds its kind, and opens it with the reader of that kind.

Each command names the kinds that it takes. A kind needs its functions and an entry in KINDS.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from data_pipelines.ingest.endings import MEDIA, ending_of
from data_pipelines.ingest.listing import Item, list_folder, list_table
from data_pipelines.ingest.plain_files import (
    FileSource,
    LineSource,
    Request,
    SingleShard,
    list_file,
    open_lines,
    source_of_files,
)
from data_pipelines.ingest.table_columns import TableKeys
from data_pipelines.ingest.tables import is_table
from data_pipelines.shards.manifest import open_manifest, resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.shard_list import tars_in
from data_pipelines.shards.side_files import user_cache
from data_pipelines.shards.source import (
    Sample,
    Source,
    check_same_on_all_ranks,
    make_cache,
    open_source,
)
from data_pipelines.shards.tar_contents import is_compressed_tar
from data_pipelines.shards.tar_index import TEXT_FILES, Modality
from data_pipelines.text.captions import captions_of
from xray import dist
from xray.config import DataConfig
from xray.errors import BadSample, ConfigError, DataError
from xray.files import nearest_path, printable
from xray.urls import conceal


@dataclass(frozen=True)
class Kind:
    """Kind of data: its description in messages, a test of a path or pattern, and its readers."""

    what: str
    fits: Callable[[str], bool]
    open: Callable[[str, Request], Source]
    items: Callable[[str, TableKeys], list[Item]] | None = None  # lists plain files, if any


MODALITIES: tuple[Modality, ...] = ("image", "video", "text")
WILD = "*?[{"


def _open_shards(where: str, request: Request) -> Source:
    cache, known = request.cache, request.known
    if request.modality:
        modality = request.modality
    else:
        if cache is None and is_remote(where):
            cache = make_cache(DataConfig())
        manifest = open_manifest(where, cache, known)
        counts = {kind: manifest.counts(kind, request.animations).sum() for kind in MODALITIES}
        modality = next((kind for kind in MODALITIES if counts[kind]), "image")
        known = manifest.state
    return open_source(request.name, where, modality, "", request.animations, cache, known)


def _files(items: Callable[[str, TableKeys], list[Item]], place: Callable[[str], str]) -> Any:
    """Return the function that opens files as a source."""

    def open_files(where: str, request: Request) -> Source:
        return source_of_files(
            items(where, TableKeys()), where, place(os.path.abspath(where)), request
        )

    return open_files


def _is_shards(where: str) -> bool:
    if os.path.isdir(where):
        return bool(tars_in(where))
    named = where.endswith(".tar") or is_compressed_tar(where)  # which gets its own message
    return is_remote(where) or named or is_pattern(where)


def is_pattern(where: str) -> bool:
    """Return True for a pattern of paths, not for a path that exists."""
    return any(c in where for c in WILD) and not os.path.exists(where)


# The kind of a path is the first one that fits.
KINDS: Mapping[str, Kind] = {
    "shards": Kind(".tar shards", _is_shards, _open_shards),
    "folder": Kind(
        "a folder of pictures and clips", os.path.isdir, _files(list_folder, str), list_folder
    ),
    "list": Kind(
        "a .csv, .tsv, .jsonl, .json or .parquet list of files",
        is_table,
        _files(list_table, os.path.dirname),
        list_table,
    ),
    "file": Kind(
        "a picture or clip",
        lambda where: ending_of(where) in MEDIA,
        _files(lambda where, keys: list_file(where), lambda _: os.sep),
        lambda where, keys: list_file(where),
    ),
    "text": Kind(
        "a .txt file of one text per line",
        lambda where: ending_of(where) == "txt" and not is_table(where),
        open_lines,
    ),
}
ALL: tuple[str, ...] = tuple(KINDS)


def kind_of(where: str, accept: Collection[str] = ALL, user: str = "xray") -> str:
    """Return the kind of the data at a path, pattern or URL.

    user: name of the caller in error messages. Raises DataError for a path that does not exist,
    that is of unknown kind, or of a kind that is not among `accept`.
    """
    if not where:
        raise DataError("no data is named: the path is empty")
    taken = " or ".join(KINDS[name].what for name in accept)
    path = where.partition("?")[0] if is_remote(where) else where  # a URL without its query
    fitting = [name for name, kind in KINDS.items() if kind.fits(path)]
    if is_remote(where):
        if len(fitting) > 1:
            raise DataError(f"{where}: only .tar shards are read from a URL; download the file")
    elif not os.path.exists(where) and not is_pattern(where):
        raise DataError(f"{where} does not exist{nearest_path(where)}")
    if not fitting:
        raise DataError(f"{where} is of unknown kind: {user} takes {taken}")
    if fitting[0] not in accept:
        own = KINDS[fitting[0]].what
        raise DataError(f"{where}: {user} takes {taken}, not {own}{_advice(where, fitting[0])}")
    return fitting[0]


def _advice(where: str, kind: str) -> str:
    if kind == "shards":
        return f": use shards as they are, as data.sources.NAME.shards={where}"
    if kind in ("folder", "list"):
        list_files(where)  # raises a clearer error if there is nothing to pack
        out = shlex.quote(shards_beside(where))
        return f". Make shards: xray data pack {shlex.quote(where)} {out}"
    return ""


def shards_beside(where: str) -> str:
    """Return the folder for the shards of a folder or table: PHOTOS_shards beside it.

    If that can neither be read nor written, it is a folder of the user's cache.
    """
    path = where.rstrip("/")
    if os.path.basename(path) in ("", ".", ".."):
        path = os.path.abspath(where)
    beside = (path if os.path.isdir(path) else os.path.splitext(path)[0]) + "_shards"
    if os.path.isdir(beside) or os.access(os.path.dirname(beside) or ".", os.W_OK):
        return beside
    real = os.path.realpath(where)
    name = f"{os.path.basename(beside)}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:12]}"
    return str(user_cache("packed") / name)


def list_files(
    where: str,
    accept: Collection[str] = ("folder", "list"),
    user: str = "xray",
    keys: TableKeys | None = None,
) -> list[Item]:
    """Return the files of a folder or list, in a fixed order; accept, user: as in `kind_of`.

    keys: columns and form of a table. A .txt file for which they are given is a table.
    """
    keys = keys or TableKeys()
    text = keys.given() and os.path.isfile(where) and ending_of(where) in ("txt", "token")
    kind = KINDS["list" if text else kind_of(where, accept, user)]
    assert kind.items is not None
    return kind.items(where, keys)


def open_data(
    where: str, request: Request, accept: Collection[str] = ALL, user: str = "xray"
) -> Source:
    """Open a user's data as a source; accept, user: as in `kind_of`. Raises DataError."""
    if request.modality not in ("", *MODALITIES):
        raise ConfigError(f"modality {request.modality}: use image, video or text")
    where = os.path.expanduser(conceal(where))
    return KINDS[kind_of(where, accept, user)].open(where, request)


def open_sources(data: DataConfig, names: Sequence[str]) -> dict[str, Source]:
    """Open the sources of a run's blocks, first on rank 0, which indexes them; raises DataError."""
    remote = any(is_remote(resolve(data.sources[name].shards, data.root)) for name in names)
    cache = make_cache(data) if remote else None

    opened: dict[str, Source] = {}

    def open_all(states: Mapping[str, str]) -> None:
        for name in names:
            config = data.sources[name]
            where = resolve(config.shards, data.root)
            state = states.get(name, "")
            own = Request(name, config.modality, config.animations, cache, state)
            try:
                opened[name] = open_data(where, own, ("shards",), "training")
            except DataError as error:
                clips = config.modality == "video" and "image" in data.modalities
                none = clips and not is_remote(where) and not os.path.exists(where)
                leave = "; if there are no clips, set data.modalities=[image]" if none else ""
                raise DataError(f"data.sources.{name}: {error}{leave}") from error

    main, patience, doing = dist.is_main(), dist.PREPARATION, "opening the data"
    dist.together(lambda: open_all({}) if main else None, patience, doing=doing)
    states = {name: source.manifest.state for name, source in opened.items()}
    states = dist.broadcast_object(states)
    dist.together(lambda: None if main else open_all(states), patience, doing=doing)
    check_same_on_all_ranks(opened)
    return opened


@dataclass(frozen=True)
class Corpus:
    """Samples by (shard, member), each with a name."""

    source: Source
    where: str  # finds them again: a pattern of shards, a folder or a file
    captions: Mapping[str, float] = field(default_factory=dict)  # their json fields
    others: int = 0  # of another modality, left out

    @property
    def modality(self) -> Modality:
        """Modality of all samples."""
        return self.source.modality

    @property
    def digest(self) -> str:
        """sha256 over what the samples are."""
        return self.source.digest

    @property
    def kind(self) -> str:
        """`shards` or `files`."""
        return "files" if isinstance(self.source, SingleShard) else "shards"

    def name(self, shard: int, member: int) -> tuple[str, str]:
        """Return (key, path below `where` of its shard or file)."""
        key, path = self.source.index(shard).key(member), self.source.manifest.name(shard)
        if isinstance(self.source, FileSource):
            path = self.source.items[member].name
        return printable(key), printable(path)

    def sample(self, shard: int, member: int, resolution: int, frames: int) -> Sample:
        """Return a picture or clip to decode; raises BadSample."""
        if self.modality == "text":
            raise BadSample("no picture", "a text")
        return self.source.sample(shard, member, resolution, frames)

    def texts(self, shard: int, member: int) -> list[str]:
        """Return the captions of a sample; raises BadSample if there are none."""
        files = self.source.read(shard, member, TEXT_FILES)
        return [printable(text) for text in captions_of(files, self.captions)]


def open_corpus(
    given: Sequence[str],
    modality: str = "",
    texts: bool = False,
    captions: Mapping[str, float] | None = None,
) -> Corpus:
    """Open shards, a folder, a list, a text file, or one or several single files.

    modality: image or video, for data that has both; "" = pictures if there are any. texts: read
    captions. Raises ConfigError or DataError for data without the requested modality.
    """
    if modality not in ("", "image", "video"):
        raise ConfigError(f"--modality {modality}: use image or video")
    given = [conceal(name) for name in given]
    request = Request("corpus", cast(Any, "text" if texts else modality))
    if len(given) == 1:
        where = os.path.expanduser(given[0])
        if kind_of(where, user="embedding") == "text":
            request = Request("corpus")
        source = open_data(where, request, user="embedding")
    else:
        paths = [os.path.expanduser(name) for name in given]
        if not all(ending_of(path) in MEDIA for path in paths):
            raise ConfigError(
                f"{given[0]}, {given[1]}, ...: give one folder, list, text file or pattern of "
                "shards, or several pictures or clips"
            )
        items = [item for path in paths for item in list_files(path, ("file",))]
        source = source_of_files(items, ", ".join(given), os.sep, request)
    if isinstance(source, LineSource):
        return Corpus(source, source.place)
    if isinstance(source, FileSource):
        return Corpus(source, source.place, captions or {}, source.others)
    where = given[0] if is_remote(given[0]) else os.path.abspath(os.path.expanduser(given[0]))
    held = {kind: int(source.manifest.counts(kind, "image").sum()) for kind in ("image", "video")}
    held.pop(source.modality, None)
    others = 0 if source.modality == "text" else sum(held.values())
    return Corpus(source, where, captions or {}, others)
