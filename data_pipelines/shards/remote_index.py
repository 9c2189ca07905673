"""Indexes and other side files of remote shards: fetched from beside the shards, or made here."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_pipelines.shards.columns import save_columns
from data_pipelines.shards.remote import ShardCache, fetch_small
from data_pipelines.shards.side_files import HIDDEN
from data_pipelines.shards.tar_index import ShardIndex, build_index, load_index
from xray.errors import DataError
from xray.files import replacing_shared
from xray.urls import is_signed

_hidden: set[str] = set()  # folders whose side files are in their hidden folder


def remote_cache_path(url: str, cache: ShardCache, ending: str) -> Path:
    """Return the local path of a file that is derived from a URL, such as its index."""
    folder = cache.create() / "index"  # not among the shards, which may be evicted
    folder.mkdir(exist_ok=True)
    return folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.{ending}"


def remote_index(
    url: str,
    cache: ShardCache,
    size: int | None = None,
    sha256: str | None = None,
    rebuild: bool = False,
) -> ShardIndex:
    """Return the index of a remote tar: a cached one, or the published one, or a new one.

    rebuild: ignore the cached index and the cached tar.
    """
    cached = remote_cache_path(url, cache, "index")
    index = None if rebuild else load_index(url, [cached])
    signed = is_signed(url)  # a signature is for one file
    if index is None and not signed and fetch_side_file(f"{url}.index", cached, cache.patience):
        index = load_index(url, [cached])
    if index is None:
        if rebuild:
            cache.forget(url)
        built = build_index(cache.fetch(url, size, sha256), checksum=True)
        save_columns(cached, built.columns, built.facts)
        index = ShardIndex(url, built.columns, built.facts)
    return index


def remote_index_file(url: str, cache: ShardCache) -> Path:
    """Return the local copy of the index of a remote tar; there is none if it has no index."""
    cached = remote_cache_path(url, cache, "index")
    if not cached.is_file():
        fetch_side_file(f"{url}.index", cached, cache.patience)
    return cached


def fetch_side_file(beside: str, target: Path, patience: float) -> bool:
    """Download a side file of remote shards; returns False if there is none (`side_file`)."""
    content = side_file(beside, patience)
    if content is not None:
        with replacing_shared(target) as temporary:
            temporary.write_bytes(content)
    return content is not None


def side_file(beside: str, patience: float) -> bytes | None:
    """Download a side file of remote shards to memory; None if there is none.

    It is published beside the shards (`beside`), or in the hidden folder there. Where a folder's
    first one was found, its others are looked for first.
    """
    folder, _, name = beside.rpartition("/")
    hidden = f"{folder}/{HIDDEN}/{name}"
    for url in (hidden, beside) if folder in _hidden else (beside, hidden):
        content = _unless_forbidden(url, patience)
        if content is not None:
            if url == hidden:
                _hidden.add(folder)
            return content
    return None


def _unless_forbidden(url: str, patience: float) -> bytes | None:
    """Download a small file; None if it is missing or forbidden.

    Stores forbid missing files to users who may not list them; web servers, all hidden files.
    """
    try:
        return fetch_small(url, patience)
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, PermissionError) or getattr(cause, "status", None) == 403:
            return None
        raise
