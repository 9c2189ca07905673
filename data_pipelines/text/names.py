"""Names of samples for people: the user's own file name instead of a key such as 000000329."""

from __future__ import annotations

from collections.abc import Mapping

from data_pipelines.shards.source import Source
from data_pipelines.text.captions import metadata_of
from xray.errors import BadSample, DataError
from xray.files import printable

# Of the json: by xray data pack; by img2dataset and video2dataset.
NAME_FIELDS = ("original_name", "url")


def original_name(files: Mapping[str, bytes]) -> str:
    """Return the original file name of a sample, or its URL; "" if its json has none."""
    try:
        content = metadata_of(dict(files))
    except BadSample:
        return ""
    names = (content.get(field) for field in NAME_FIELDS)
    return printable(next((name for name in names if isinstance(name, str) and name), ""))


def name_at(source: Source, shard: int, member: int) -> str:
    """Return the original name of a member, or its key if it has none or cannot be read."""
    try:
        found = original_name(source.read(shard, member, ("json",)))
    except (BadSample, DataError):
        found = ""
    return found or printable(source.index(shard).key(member))


def with_key(name: str, key: str) -> str:
    """Return a sample's name with its key, which finds it in its tar: `photo.jpg (000000329)`."""
    return f"{name} ({key})" if name and name != key else key
