"""The manifest of a source: its shards as columns, in one memory-mapped file beside them.

A run opens the manifest and no index: what a plan needs of a shard is its count of samples. A
million shards cost a listing of the folder, and some megabytes of mapped columns.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.columns import (
    Columns,
    open_columns,
    pack_texts,
    save_columns,
    text_at,
    unpack_texts,
)
from data_pipelines.shards.remote import ShardCache, expand, fetch_small, is_remote
from data_pipelines.shards.tar_index import (
    INDEX_VERSION,
    Modality,
    ShardIndex,
    build_index,
    cache_path,
    index_shard,
    kept_at,
    load_index,
    media_extensions,
)
from xray.errors import DataError
from xray.files import is_inside, replacing, unique_temporary

log = logging.getLogger("xray")
MANIFEST_VERSION = 2
# What a shard's samples may be counted as: (modality, what animations are).
COUNTED: tuple[tuple[Modality, Modality], ...] = (
    ("image", "image"),
    ("image", "video"),
    ("video", "image"),
    ("video", "video"),
    ("text", "image"),
    ("text", "video"),
)
Progress = Callable[[Iterable[ShardIndex], int], Iterable[ShardIndex]]  # (indexes, how many)


@dataclass(frozen=True)
class Manifest:
    """The shards of a source.

    columns: names and name_ends (packed texts: path relative to `folder`), sizes and mtimes [S]
    int64, counts [S, 6] int32 (samples by COUNTED), digests [S, 32] uint8 (of the indexes),
    sha256 [S, 32] uint8 (of the tars; zeros = not taken). facts: digest of all.
    """

    folder: str
    columns: Columns
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns["sizes"])

    @property
    def digest(self) -> str:
        return self.facts["digest"]

    def name(self, shard: int) -> str:
        return text_at(self.columns["names"], self.columns["name_ends"], shard)

    @functools.cached_property
    def names(self) -> list[str]:
        return unpack_texts(self.columns["names"], self.columns["name_ends"])

    def path(self, shard: int) -> str:
        """Where a shard is: a local path or a URL."""
        return _join(self.folder, self.name(shard))

    def counts(self, modality: Modality, animations: Modality) -> np.ndarray:
        """Samples of a modality per shard, [S]."""
        return self.columns["counts"][:, COUNTED.index((modality, animations))]

    def checksum(self, shard: int) -> str | None:
        """A tar's sha256, where it was taken."""
        row = self.columns["sha256"][shard]
        return row.tobytes().hex() if row.any() else None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if is_remote(folder) else os.path.join(folder, name)


def resolve(pattern: str, root: str = "") -> str:
    """A pattern below a root; either may be a URL."""
    if is_remote(pattern) or not root:
        return os.path.expanduser(pattern)
    if is_remote(root):
        return f"{root.rstrip('/')}/{pattern}"
    return os.path.join(os.path.expanduser(root), os.path.expanduser(pattern))


def find_shards(pattern: str) -> list[str]:
    """Tars of a folder, glob or {000..123} pattern; raises DataError when there is none."""
    if is_remote(pattern):
        return expand(pattern)
    if os.path.isdir(pattern):
        with os.scandir(pattern) as entries:
            paths = sorted(entry.path for entry in entries if entry.name.endswith(".tar"))
    elif any(c in pattern for c in "*?["):
        paths = sorted(glob.glob(pattern))
    else:
        from webdataset.shardlists import expand_urls

        paths = expand_urls(pattern)
        if not pattern.endswith(".tar") and not os.path.exists(paths[0]):
            raise DataError(f"{pattern} is neither a folder of .tar shards nor a .tar")
    if not paths:
        raise DataError(f"no .tar shards at {pattern}")
    return paths


def open_manifest(pattern: str, cache: ShardCache | None = None, verify: bool = True) -> Manifest:
    """The manifest of the shards at a pattern, from its file where that is current, else built.

    verify: compare it with the tars' sizes and times, as one process of a run does. Raises
    DataError for shards that cannot be used.
    """
    if is_remote(pattern):
        return _open_remote(pattern, _needed(cache), verify)
    folder, wanted = _place(pattern)
    found = [_load(folder, kept) for kept in kept_at(wanted)]
    known = [manifest for manifest in found if manifest is not None]
    if known and not verify:
        return known[0]
    paths = find_shards(pattern)
    stamps = _stamps(paths)
    names = [os.path.relpath(path, folder) for path in paths]
    for manifest in known:
        if manifest.names == names and _same(manifest.columns, stamps):
            return manifest
    return write_manifest(pattern)


def write_manifest(
    pattern: str,
    cache: ShardCache | None = None,
    checksum: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """Index every shard at a pattern and write their manifest; current indexes are reused.

    Raises DataError for a shard that cannot be used.
    """
    if is_remote(pattern):
        return _write_remote(pattern, _needed(cache), progress or _logged)
    folder, wanted = _place(pattern)
    paths = find_shards(pattern)
    indexes = (progress or _logged)(_index_all(paths, checksum, workers), len(paths))
    names = [os.path.relpath(path, folder) for path in paths]
    return _save(folder, cache_path(wanted), names, indexes)


def _index_all(paths: list[str], checksum: bool, workers: int) -> Iterator[ShardIndex]:
    if workers <= 1 or len(paths) == 1:
        yield from map(index_shard, paths, repeat(checksum))
        return
    with ProcessPoolExecutor(min(workers, len(paths)), get_context("spawn")) as pool:
        yield from pool.map(index_shard, paths, repeat(checksum), chunksize=4)


def _logged(indexes: Iterable[ShardIndex], total: int) -> Iterator[ShardIndex]:
    """Say how far a long indexing has come; without a console of its own."""
    import time

    started = said = time.monotonic()
    for number, index in enumerate(indexes, start=1):
        yield index
        now = time.monotonic()
        if now - said > 10:
            said, left = now, (now - started) / number * (total - number)
            log.info("indexed %d of %d shards, about %.0f s left", number, total, left)


def _save(folder: str, cached: Path, names: list[str], indexes: Iterable[ShardIndex]) -> Manifest:
    rows = [_row(index) for index in indexes]
    blob, ends = pack_texts(names)
    digests = b"".join(bytes.fromhex(row["digest"]) for row in rows)
    checksums = b"".join(bytes.fromhex(row["sha256"] or "00" * 32) for row in rows)
    columns = {
        "names": blob,
        "name_ends": ends,
        "sizes": np.array([row["size"] for row in rows], np.int64),
        "mtimes": np.array([row["mtime"] for row in rows], np.int64),
        "counts": np.array([row["counts"] for row in rows], np.int32),
        "digests": np.frombuffer(digests, np.uint8).reshape(-1, 32),
        "sha256": np.frombuffer(checksums, np.uint8).reshape(-1, 32),
    }
    digest = hashlib.sha256(b"\0".join([blob.tobytes(), ends.tobytes(), digests])).hexdigest()
    facts = {"version": MANIFEST_VERSION, "index_version": INDEX_VERSION, "digest": digest}
    save_columns(cached, columns, facts)
    return Manifest(folder, columns, facts)


def _row(index: ShardIndex) -> dict[str, Any]:
    counts = [len(index.members_with(media_extensions(*kind))) for kind in COUNTED]
    return {**index.facts, "counts": counts}


def _load(folder: str, cached: Path) -> Manifest | None:
    try:
        columns, facts = open_columns(cached)
        version = facts["version"], facts["index_version"]
    except (OSError, ValueError, KeyError):
        return None
    return (
        Manifest(folder, columns, facts) if version == (MANIFEST_VERSION, INDEX_VERSION) else None
    )


def _place(pattern: str) -> tuple[str, Path]:
    """(folder that shard names are relative to, where the manifest is best kept)."""
    if os.path.isdir(pattern):
        folder, name = pattern, "shards.manifest"
    else:
        head = pattern
        while head and any(c in head for c in "*?[{"):
            head = os.path.dirname(head)
        folder = head if os.path.isdir(head) else os.path.dirname(head)
        tail = hashlib.sha256(os.path.relpath(pattern, folder or ".").encode()).hexdigest()[:8]
        name = f"shards-{tail}.manifest"
    folder = folder or "."
    if not os.path.isdir(folder):
        raise DataError(f"shards {pattern}: there is no folder {folder}")
    return folder, Path(folder) / name


def _same(columns: Columns, others: Columns) -> bool:
    return all(np.array_equal(columns[name], column) for name, column in others.items())


def _stamps(paths: list[str]) -> Columns:
    sizes, mtimes = np.empty(len(paths), np.int64), np.empty(len(paths), np.int64)
    for number, path in enumerate(paths):
        try:
            status = os.stat(path)
        except FileNotFoundError as error:
            raise DataError(f"shard {path} does not exist") from error
        sizes[number], mtimes[number] = status.st_size, status.st_mtime_ns
    return {"sizes": sizes, "mtimes": mtimes}


# remote ---------------------------------------------------------------------------------------


def _needed(cache: ShardCache | None) -> ShardCache:
    assert cache is not None, "a remote source is opened with a cache"
    return cache


def _remote_folder(pattern: str) -> str:
    """The folder of a URL pattern: all of it that holds no wildcard."""
    head = pattern.rstrip("/")
    if head.endswith(".tar") or any(c in head for c in "*?[{"):
        while head.endswith(".tar") or any(c in head for c in "*?[{"):
            head = head.rpartition("/")[0]
    return head


def _is_folder(pattern: str) -> bool:
    return _remote_folder(pattern) == pattern.rstrip("/")


def _open_remote(pattern: str, cache: ShardCache, verify: bool) -> Manifest:
    """A manifest that lies with the shards, or one written here before, or a new one.

    Remote tars are taken to be final: their sizes are not asked for; `fetch` compares them.
    """
    folder, cached = _remote_folder(pattern), _remote_manifest(pattern, cache)
    known = _load(folder, cached)
    if (verify or known is None) and _is_folder(pattern):
        content = fetch_small(f"{folder}/shards.manifest", cache.patience)
        if content is not None:
            _write(cached, content)
            known = _load(folder, cached)
            if known is not None and not all(map(is_inside, known.names)):
                raise DataError(f"{folder}/shards.manifest names shards outside its folder")
    return known or _write_remote(pattern, cache, _logged)


def _write_remote(pattern: str, cache: ShardCache, progress: Progress) -> Manifest:
    folder, urls = _remote_folder(pattern), find_shards(pattern)
    indexes = progress((remote_index(url, cache, anew=True) for url in urls), len(urls))
    names = [url.removeprefix(f"{folder}/") for url in urls]
    return _save(folder, _remote_manifest(pattern, cache), names, indexes)


def _remote_manifest(pattern: str, cache: ShardCache) -> Path:
    return kept_of_remote(pattern, cache, "manifest")


def kept_of_remote(url: str, cache: ShardCache, ending: str) -> Path:
    """Where a file that was derived from what lies at a URL is kept."""
    folder = cache.folder / "index"  # apart from the shards, which come and go
    folder.mkdir(exist_ok=True)
    return folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.{ending}"


def remote_index(
    url: str,
    cache: ShardCache,
    size: int | None = None,
    sha256: str | None = None,
    anew: bool = False,
) -> ShardIndex:
    """The index of a remote tar: kept here (not `anew`), lying beside it, or built from the tar."""
    kept = kept_of_remote(url, cache, "index")
    index = None if anew else load_index(url, kept)
    if index is None:
        content = fetch_small(f"{url}.index", cache.patience)
        if content is not None:
            _write(kept, content)
            index = load_index(url, kept)
    if index is None:
        if anew:
            cache.forget(url)
        built = build_index(cache.fetch(url, size, sha256), checksum=True)
        save_columns(kept, built.columns, built.facts)
        index = ShardIndex(url, built.columns, built.facts)
    return index


def _write(path: Path, content: bytes) -> None:
    with replacing(path, unique_temporary(path)) as temporary:
        temporary.write_bytes(content)
