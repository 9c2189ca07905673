"""Shards at URLs: fetched once per host into a bounded folder that all its processes share.

A file lock per shard makes one process download it while the others wait; the file appears under
its name only when it is whole. What fails in passing is tried again, what cannot succeed is not.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import queue
import random
import shutil
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from xray.errors import DataError
from xray.files import locked, replacing

T = TypeVar("T")
Body = TypeVar("Body", io.BufferedWriter, io.BytesIO)
log = logging.getLogger("xray")

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries: doubled from the one to the other
CONNECT_TIMEOUT, READ_TIMEOUT = 30.0, 60.0  # seconds without a connection, or without one byte
LIST_PATIENCE = 60.0  # seconds to go on trying to list a folder
CHUNK, BLOCK = 2**20, 2**24  # bytes per read, and per request to an object store
PREFETCH_THREADS = 2
HTTP = ("http://", "https://")
FINAL_STATUS = (401, 403, 405, 410, 451)  # 404 is a FileNotFoundError; all others may pass
# fsspec drops its instances in a forked child. To finalize one there takes a second, and takes the
# parent's idle connections off the event queue that both share: it would not notice an answer.
_alive: set[Any] = set()
Job = tuple[str, "int | None", "str | None"]  # url, size, sha256
_caches: weakref.WeakSet[ShardCache] = weakref.WeakSet()


def _start_in_child() -> None:
    """Give a forked process's caches their own counts and threads."""
    for cache in list(_caches):
        cache._start()


os.register_at_fork(after_in_child=_start_in_child)


def is_remote(path: str) -> bool:
    """Whether a path is a URL; file:// is one."""
    return "://" in path


def expand(url: str) -> list[str]:
    """The shards that a URL stands for: {000..123} braces, "*" patterns and folders of tars.

    Raises DataError where none is found, or the protocol needs a package that is not installed.
    """
    fs, path = filesystem(url, LIST_PATIENCE)
    if "{" in url:
        from webdataset.shardlists import expand_urls

        try:
            parts = expand_urls(url)
        except (ValueError, AssertionError) as error:
            raise DataError(f"{url} cannot be expanded: {error}") from error
        return [shard for part in parts for shard in expand(part)]
    if "*" not in url:
        if not url.endswith("/") and url.partition("?")[0].endswith(".tar"):
            return [url]
        return expand(url.rstrip("/") + "/*.tar")
    with suppress(FileNotFoundError):
        if found := persist(url, LIST_PATIENCE, lambda: fs.glob(path)):
            return sorted(fs.unstrip_protocol(name) for name in found)
    raise DataError(f"no shards at {url}")


def fetch_small(url: str, patience: float) -> bytes | None:
    """The bytes of a small file, None where there is none; raises DataError after `patience` s."""
    with suppress(FileNotFoundError):
        body = persist(url, patience, lambda: _stream(url, io.BytesIO(), None, patience))
        return body.getvalue()
    return None


def fetch_file(url: str, target: Path, patience: float) -> str:
    """Download a file whole or not at all, and return its sha256.

    Raises FileNotFoundError, and DataError after `patience` s. One process at a time per target.
    """
    with replacing(target) as temporary:

        def download() -> str:
            with _HashedFile(temporary, sys.maxsize, "") as body:
                _stream(url, body, None, patience)
            return body.digest.hexdigest()

        return persist(url, patience, download)


class ShardCache:
    """A folder of fetched shards: at most `limit` bytes stay, and the one used longest ago goes.

    Processes may share the folder, and fork at any time. hits and misses count this process's
    calls of fetch: those that found the shard, or waited for it, and those that downloaded it.
    """

    def __init__(self, folder: Path, limit: int, patience: float) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience
        self._start()
        _caches.add(self)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the shard cache {folder} cannot be made: {error}") from error

    def _start(self) -> None:
        """What is a process's own: a fork leaves the threads and the counts in the parent."""
        self.hits = self.misses = 0
        self._closed = False
        self._ahead: set[str] = set()  # urls that wait for a slot or are being fetched
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path, int, float]]:
        return ShardCache, (self.folder, self.limit, self.patience)  # to workers that are spawned

    def fetch(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """The local path of a shard, downloaded where it is not there yet.

        Another process may evict the file before it is opened: on FileNotFoundError, fetch again.
        Raises DataError for a shard that does not exist, that is larger than the cache, or that
        cannot be had within `patience` seconds.
        """
        found = self._obtain(url, size, sha256)
        self.hits += found
        self.misses += not found
        return self._path(url)

    def forget(self, url: str) -> None:
        """Drop a shard that may have changed, so that the next fetch downloads it."""
        self._path(url).unlink(missing_ok=True)

    def prefetch(self, url: str, size: int | None = None, sha256: str | None = None) -> None:
        """Fetch a shard in a background thread; a failure is left for fetch to meet."""
        if url not in self._ahead:
            self._ahead.add(url)
            self._jobs.put((url, size, sha256))
            if len(self._workers) < PREFETCH_THREADS:
                # A daemon: exit would wait for the threads of a ThreadPoolExecutor.
                self._workers.append(threading.Thread(target=self._fetch_ahead, daemon=True))
                self._workers[-1].start()

    def _fetch_ahead(self) -> None:
        while True:
            url, size, sha256 = self._jobs.get()
            try:
                if not self._closed:
                    self._obtain(url, size, sha256)
            except (DataError, OSError) as error:
                log.debug("not fetched ahead: %s", error)
            finally:
                self._ahead.discard(url)

    def close(self) -> None:
        """Drop the prefetches that have not begun."""
        self._closed = True

    def _path(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"

    def _obtain(self, url: str, size: int | None, sha256: str | None) -> bool:
        """Have a shard in the folder; True where this call did not have to download it."""
        path = self._path(url)
        if _touch(path, size):
            return True
        verdict = path.with_suffix(".lock")
        verdict.touch()
        before = verdict.read_text()
        with locked(verdict):
            if _touch(path, size):
                return True
            # Of many that wait for one shard, only the first is to spend its patience on it.
            if (after := verdict.read_text()) != before:
                raise DataError(after.partition("\n")[2])
            try:
                persist(f"shard {url}", self.patience, lambda: self._download(url, size, sha256))
            except DataError as error:
                with suppress(OSError):  # a full disk must not hide the reason
                    verdict.write_text(f"{uuid.uuid4()}\n{error}")
                raise
        self._evict(keep=path)
        return False

    def _download(self, url: str, size: int | None, sha256: str | None) -> None:
        path = self._path(url)
        temporary = path.with_suffix(".tmp")  # one name is enough: the lock has one holder
        too_large = f"shard {url} is over the whole cache: raise data.cache_gb"
        if size is not None and size > self.limit:
            raise DataError(too_large)
        try:
            with replacing(path, temporary):
                with _HashedFile(temporary, self.limit, too_large) as body:
                    _stream(url, body, size, self.patience)
                if sha256 is not None and body.digest.hexdigest() != sha256.lower():
                    raise OSError(f"sha256 {body.digest.hexdigest()} where {sha256} was expected")
        except FileNotFoundError as error:
            raise DataError(f"shard {url} does not exist") from error

    def _evict(self, keep: Path) -> None:
        with locked(self.folder / "folder.lock"):
            shards = []
            for path in self.folder.glob("*.tar"):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    shards.append((status.st_mtime_ns, status.st_size, path))
            excess = sum(size for _, size, _ in shards) - self.limit
            for _, size, path in sorted(shards):
                if excess > 0 and path != keep:
                    path.unlink(missing_ok=True)
                    excess -= size
            for temporary in self.folder.glob("*.tmp"):
                # Whoever writes it holds the lock, so a free lock means that its writer died.
                lock = locked(temporary.with_suffix(".lock"), fcntl.LOCK_NB)
                with suppress(BlockingIOError), lock:
                    temporary.unlink(missing_ok=True)


class _HashedFile(io.BufferedWriter):
    """A file while it is received: hashes what comes, and stops at the limit."""

    def __init__(self, path: Path, limit: int, too_large: str) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.digest, self._limit, self._too_large = hashlib.sha256(), limit, too_large

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self._limit:
            raise DataError(self._too_large)
        self.digest.update(data)
        return super().write(data)


def _touch(path: Path, size: int | None) -> bool:
    """Mark a shard as just used; False where there is none, or one of another size."""
    with suppress(FileNotFoundError):
        if size is None or path.stat().st_size == size:
            os.utime(path)
            return True
    return False


def filesystem(url: str, patience: float) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    try:
        from fsspec.core import url_to_fs

        if url.startswith(HTTP):
            from aiohttp import ClientTimeout

            silence = min(READ_TIMEOUT, max(patience, 1.0))
            timeout = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=silence)
            headers = {"Accept-Encoding": "identity"}  # the size and sha256 are the file's own
            options["client_kwargs"] = {"timeout": timeout, "headers": headers, "trust_env": True}
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        missing = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        raise DataError(f"{url} needs a package: pip install {missing.name}") from error
    except ValueError as error:
        raise DataError(f"{url} cannot be opened: {error}") from error
    _alive.add(fs)
    return fs, path


def _stream(url: str, body: Body, size: int | None, patience: float) -> Body:
    fs, path = filesystem(url, patience)
    if url.startswith(HTTP):
        # One GET, checked against its Content-Length; open() would ask for the size first, take
        # any failure of that for a missing file, and leave refused answers unread.
        fs.get_file(path, body)
    else:  # get_file might not take an open file
        size = fs.size(path) if size is None else size
        with fs.open(path, block_size=BLOCK) as stream:
            shutil.copyfileobj(stream, body, CHUNK)
    if size not in (None, body.tell()):
        raise OSError(f"{body.tell():,} bytes where {size:,} were expected")
    return body


def persist(what: str, patience: float, attempt: Callable[[], T]) -> T:
    start, wait, tries = time.monotonic(), FIRST_WAIT, 1
    while True:
        try:
            return attempt()
        except (DataError, FileNotFoundError):
            raise
        except Exception as error:  # every protocol's package has its own
            (cause, final), spent = _explain(error), time.monotonic() - start
            if final or spent >= patience:
                after = "" if final else f" after {tries} tries in {spent:.0f} s"
                raise DataError(f"{what} cannot be fetched{after}: {cause}") from error
        # Not from the global generator: its state belongs to the run, and forks share it.
        pause = min(wait * random.SystemRandom().uniform(0.5, 1.5), patience - spent)
        wait, tries = min(2 * wait, LONGEST_WAIT), tries + 1
        if threading.main_thread().is_alive():  # exit cuts connections, which is no news
            log.warning("%s: %s; try %d in %.1f s", what, cause, tries, pause)
        time.sleep(pause)


def _explain(error: Exception) -> tuple[str, bool]:
    """The cause in one line, and whether trying again is in vain."""
    aiohttp = sys.modules.get("aiohttp")  # where it is not imported, no error is of its kind
    if aiohttp is not None and isinstance(error, aiohttp.ClientResponseError):
        return f"HTTP {error.status} {error.message}", error.status in FINAL_STATUS
    text = " ".join(str(error).split()) or error.__cause__  # fsspec's timeouts say nothing
    final = isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError))
    return f"{type(error).__name__}: {text}", final
