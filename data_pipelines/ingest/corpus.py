"""Data to embed or to search for: any kind of data, or several single files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from data_pipelines.ingest.items import MEDIA as ENDINGS
from data_pipelines.ingest.kind import Request
from data_pipelines.ingest.plain_files import FileSource, SingleShard, source_of_files
from data_pipelines.ingest.text_lines import LineSource, is_text
from data_pipelines.ingest.user_data import list_files, open_data
from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import Sample, Source
from data_pipelines.shards.tar_index import TEXT_FILES, Modality
from data_pipelines.shards.utf8 import printable
from data_pipelines.text.captions import captions_of
from xray.errors import ConfigError

MEDIA = tuple(f".{ending}" for ending in sorted(ENDINGS))


@dataclass(frozen=True)
class Corpus:
    """Samples by (shard, member), each with a name.

    where: finds them again: a pattern of shards, a folder or a file. captions: their json fields.
    others: pictures or clips of another modality, which are left out.
    """

    source: Source
    where: str
    captions: Mapping[str, float] = field(default_factory=dict)
    others: int = 0

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

    modality: image or video, for data that has both; "" = what there is, pictures first. texts:
    captions are wanted. Raises ConfigError or DataError for data that holds none of it.
    """
    if modality not in ("", "image", "video"):
        raise ConfigError(f"--modality {modality}: use image or video")
    request = Request("corpus", cast(Any, "text" if texts else modality))
    if len(given) == 1:
        where = os.path.expanduser(given[0])
        if is_text(where):
            request = Request("corpus")
        source = open_data(where, request, user="embedding")
    else:
        paths = [os.path.expanduser(name) for name in given]
        if not all(path.lower().endswith(MEDIA) for path in paths):
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
