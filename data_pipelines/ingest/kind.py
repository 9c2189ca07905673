"""Kind of data that a user can give, and the request to open it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from data_pipelines.ingest.items import Item
from data_pipelines.shards.remote import ShardCache
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import Modality


@dataclass(frozen=True)
class Request:
    """Settings of the source to open.

    modality: "" selects the first of image, video and text that the data has. animations: modality
    of GIF and WebP files. verify: compare the manifest of the shards with the sizes and times of
    the tars.
    """

    name: str
    modality: Modality | Literal[""] = ""
    animations: Modality = "image"
    cache: ShardCache | None = None
    verify: bool = True


@dataclass(frozen=True)
class Kind:
    """Kind of data: its description in messages, a test of a path or pattern, and its readers.

    items: function that lists plain files; None for a kind that has no plain files.
    """

    what: str
    fits: Callable[[str], bool]
    open: Callable[[str, Request], Source]
    items: Callable[[str], list[Item]] | None = None
