"""Manifest of a source: names, sizes and sample counts of its shards, in one memory-mapped file.

A run opens the manifest but no shard index, because a sampling plan only needs the number of
samples per shard. So opening a million shards takes one listing of the folder and some megabytes
of mapped columns.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.columns import (
    Columns,
    open_first,
    pack_texts,
    save_columns,
    text_at,
    unpack_texts,
)
from data_pipelines.shards.process_pool import Progress, over_shards
from data_pipelines.shards.remote import ShardCache, expand, is_remote
from data_pipelines.shards.remote_index import fetch_side_file, remote_cache_path, remote_index
from data_pipelines.shards.shard_list import find_shards
from data_pipelines.shards.side_files import path_to_write, possible_paths
from data_pipelines.shards.tar_index import (
    INDEX_VERSION,
    Modality,
    ShardIndex,
    index_shard,
    keep_columns,
    media_extensions,
)
from xray.errors import DataError
from xray.files import is_inside, nearest_path
from xray.urls import conceal, url_folder

log = logging.getLogger("xray")
MANIFEST_VERSION = 2
VERSIONS = {"version": MANIFEST_VERSION, "index_version": INDEX_VERSION}
# Columns of `counts`: (modality of the samples, modality that GIF and WebP files count as).
COUNTED: tuple[tuple[Modality, Modality], ...] = (
    ("image", "image"),
    ("image", "video"),
    ("video", "image"),
    ("video", "video"),
    ("text", "image"),
    ("text", "video"),
)


@dataclass(frozen=True)
class Manifest:
    """Shards of a source.

    columns: names and name_ends (packed texts, paths relative to `folder`); sizes (bytes) and
    mtimes (ns) of the tars, [S] int64; counts [S, 6] int32, samples by COUNTED; digests of the
    indexes, [S, 32] uint8; sha256 of the tars, [S, 32] uint8, zeros = not computed. facts: digest
    of all names and indexes. seed_names: names that seed the samples' random draws, if others.
    """

    folder: str
    columns: Columns
    facts: dict[str, Any]
    seed_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns["sizes"])

    @property
    def digest(self) -> str:
        """Digest (sha256) of all shard names and indexes."""
        return self.facts["digest"]

    @functools.cached_property
    def state(self) -> str:
        """sha256 of the digest, and of the sizes and mtimes of the tars."""
        stamps = (self.columns[key].tobytes() for key in ("sizes", "mtimes"))
        return hashlib.sha256(b"\0".join([self.digest.encode(), *stamps])).hexdigest()

    @property
    def is_current(self) -> bool:
        """Return True if the manifest is of this version; others are written again."""
        return VERSIONS.items() <= self.facts.items()

    def name(self, shard: int) -> str:
        """Return the name of a shard: its path relative to the folder."""
        return text_at(self.columns["names"], self.columns["name_ends"], shard)

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of all shards, [S]."""
        return unpack_texts(self.columns["names"], self.columns["name_ends"])

    def path(self, shard: int) -> str:
        """Return the local path or the URL of a shard."""
        folder, name = self.folder, self.name(shard)
        return f"{folder}/{name}" if is_remote(folder) else os.path.join(folder, name)

    def counts(self, modality: Modality, animations: Modality) -> np.ndarray:
        """Return the number of samples of a modality in each shard, [S]."""
        return self.columns["counts"][:, COUNTED.index((modality, animations))]

    def index_digest(self, shard: int) -> str:
        """Return the digest of the index of a shard."""
        return self.columns["digests"][shard].tobytes().hex()

    def stamp(self, shard: int) -> dict[str, int]:
        """Return the size and mtime of a tar, as the facts of its index have them."""
        return {key: int(self.columns[f"{key}s"][shard]) for key in ("size", "mtime")}

    def tar(self, shard: int) -> tuple[int, str | None]:
        """Return the size in bytes and the sha256 of a tar; None if it was not computed."""
        row = self.columns["sha256"][shard]
        return int(self.columns["sizes"][shard]), row.tobytes().hex() if row.any() else None


def as_named(manifest: Manifest, pattern: str) -> Manifest:
    """Return a manifest with the digest and the seeds of older runs of a signed URL pattern.

    Their shards' names had the signatures. The names that are shown and written have none.
    """
    folder = url_folder(pattern)
    names = [url.removeprefix(f"{folder}/") for url in expand(pattern)]
    if len(names) != len(manifest):
        return manifest
    blob, ends = pack_texts(names)
    digest = _digest(blob, ends, manifest.columns["digests"].tobytes())
    return replace(manifest, facts={**manifest.facts, "digest": digest}, seed_names=tuple(names))


def resolve(pattern: str, root: str = "") -> str:
    """Join a shard pattern to a root folder; either may be a URL, whose credentials it conceals.

    "." is the root itself.
    """
    pattern, root = conceal(pattern), conceal(root)
    if is_remote(pattern) or not root:
        return os.path.expanduser(pattern)
    if pattern == ".":
        return root.rstrip("/") if is_remote(root) else os.path.expanduser(root)
    if is_remote(root):
        return f"{root.rstrip('/')}/{pattern}"
    return os.path.join(os.path.expanduser(root), os.path.expanduser(pattern))


def open_manifest(pattern: str, cache: ShardCache | None = None, known: str = "") -> Manifest:
    """Open the manifest of the shards at a pattern; it is built if there is no current one.

    known: state of the manifest, if it was compared with the sizes and mtimes of the tars just
    before; in a run, one process compares it. Raises DataError for shards that cannot be used.
    """
    if is_remote(pattern):
        assert cache is not None, "a remote source is opened with a cache"
        return _open_remote(conceal(pattern), cache, known)
    folder, wanted = _manifest_path(pattern)
    loaded = [load_manifest(folder, path) for path in possible_paths(wanted)]
    manifests = [manifest for manifest in loaded if manifest is not None]
    for manifest in manifests:
        if manifest.state == known:
            return manifest
    paths = find_shards(pattern)
    stamps = _stamps(paths)
    names = [os.path.relpath(path, folder) for path in paths]
    for manifest in manifests:
        same = (np.array_equal(manifest.columns[key], stamps[key]) for key in stamps)
        if manifest.names == names and all(same):
            return manifest
    return write_manifest(pattern, required=False)


def write_manifest(
    pattern: str,
    cache: ShardCache | None = None,
    checksum: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
    required: bool = True,
) -> Manifest:
    """Index every shard at a pattern and write the manifest; current indexes are reused.

    checksum: also compute the sha256 of each tar. required: the manifest must be written, not only
    returned. Raises DataError for a shard that cannot be used.
    """
    progress = progress or _log_progress
    if is_remote(pattern):
        assert cache is not None, "a remote source is opened with a cache"
        return _write_remote(conceal(pattern), cache, progress)
    folder, wanted = _manifest_path(pattern)
    paths = find_shards(pattern)
    indexes = over_shards(functools.partial(_index, paths, checksum), len(paths), workers, progress)
    names = [os.path.relpath(path, folder) for path in paths]
    return _save(folder, path_to_write(wanted), names, indexes, required)


def _index(paths: list[str], checksum: bool, shard: int) -> ShardIndex:
    return index_shard(paths[shard], checksum)


def _log_progress(indexes: Iterable[ShardIndex], total: int) -> Iterator[ShardIndex]:
    """Log progress every 10 s while shards are indexed without a progress bar."""
    started = logged = time.monotonic()
    for number, index in enumerate(indexes, start=1):
        yield index
        now = time.monotonic()
        if now - logged > 10:
            logged, left = now, (now - started) / number * (total - number)
            log.info("indexed %d of %d shards, about %.0f s left", number, total, left)


def _save(
    folder: str,
    cached: Path,
    names: list[str],
    indexes: Iterable[ShardIndex],
    required: bool = True,
) -> Manifest:
    rows = [
        {**index.facts, "counts": [len(index.members_with(media_extensions(*k))) for k in COUNTED]}
        for index in indexes
    ]
    _tell_of_left_out(folder, names, [row.get("left_out", {}) for row in rows])
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
    digest = _digest(blob, ends, digests)
    facts = {**VERSIONS, "digest": digest}
    (save_columns if required else keep_columns)(cached, columns, facts)
    return Manifest(folder, columns, facts)


def _digest(names: np.ndarray, name_ends: np.ndarray, digests: bytes) -> str:
    parts = [names.tobytes(), name_ends.tobytes(), digests]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _tell_of_left_out(folder: str, names: list[str], left_out: list[dict[str, Any]]) -> None:
    """Log, in one line, which members of the tars are in no sample."""
    parts = []
    for cause in sorted({cause for of_shard in left_out for cause in of_shard}):
        counts = [of_shard.get(cause, (0, "")) for of_shard in left_out]
        shard = next(number for number, (count, _) in enumerate(counts) if count)
        first = f"{counts[shard][1]} in {names[shard]}"
        parts.append(f"{sum(count for count, _ in counts):,} x {cause} (first {first})")
    if parts:
        log.warning("%s: members of tars left out: %s", folder, "; ".join(parts))


def load_manifest(folder: str, cached: Path) -> Manifest | None:
    """Load a manifest from a file; None if it is missing, damaged or of another version."""
    columns, facts = open_first([cached], VERSIONS)
    return Manifest(folder, columns, facts) if columns else None


def _manifest_path(pattern: str) -> tuple[str, Path]:
    """Return (folder that shard names are relative to, path of the manifest beside the shards)."""
    if os.path.isdir(pattern):
        folder, name = pattern, "shards.manifest"
    else:
        head = pattern
        while head and any(c in head for c in "*?[{"):
            head = os.path.dirname(head)
        folder = head if os.path.isdir(head) else os.path.dirname(head)
        below = os.path.relpath(pattern, folder or ".").encode("utf-8", "surrogateescape")
        tail = hashlib.sha256(below).hexdigest()[:8]
        name = f"shards-{tail}.manifest"
    folder = folder or "."
    if not os.path.isdir(folder):
        raise DataError(f"shards {pattern}: folder {folder} does not exist{nearest_path(folder)}")
    return folder, Path(folder) / name


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


def _open_remote(pattern: str, cache: ShardCache, known: str) -> Manifest:
    """Open the manifest beside the remote shards, or a cached one, or build it.

    Remote tars are assumed not to change, so their sizes are not requested here. `fetch` compares
    the size of each tar that it downloads.
    """
    folder, cached = url_folder(pattern), remote_cache_path(pattern, cache, "manifest")
    manifest = load_manifest(folder, cached)
    beside = f"{folder}/shards.manifest" if folder == pattern.rstrip("/") else ""
    wanted = beside and (manifest is None or manifest.state != known)
    if wanted and fetch_side_file(beside, cached, cache.patience):
        manifest = load_manifest(folder, cached)
        if manifest is not None and not all(map(is_inside, manifest.names)):
            raise DataError(
                f"{beside} lists shards outside its folder: write it again with xray data index"
            )
    return manifest or _write_remote(pattern, cache, _log_progress)


def _write_remote(pattern: str, cache: ShardCache, progress: Progress) -> Manifest:
    folder, urls = url_folder(pattern), find_shards(pattern)
    indexes = progress((remote_index(url, cache, rebuild=True) for url in urls), len(urls))
    names = [url.removeprefix(f"{folder}/") for url in urls]
    return _save(folder, remote_cache_path(pattern, cache, "manifest"), names, indexes)
