"""Cache of remote shards: each host downloads a shard once, into a folder of limited size.

All processes of a host share the folder. A file lock per shard lets one process download it while
the others wait. A file gets its final name only when its download is complete. Temporary errors
are retried with exponential backoff; permanent errors are raised at once.
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

from data_pipelines.shards.tar_contents import is_system_file
from xray import hub
from xray.errors import ConfigError, DataError
from xray.files import locked, make_folder, replacing
from xray.urls import conceal, redact, remember, remembered, reveal

T = TypeVar("T")
Body = TypeVar("Body", io.BufferedWriter, io.BytesIO)
log = logging.getLogger("xray")

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries; each wait doubles up to the longest
CONNECT_TIMEOUT, READ_TIMEOUT = 30.0, 60.0  # seconds to connect, and between received bytes
LIST_PATIENCE = 60.0  # seconds to keep trying to list a folder
CHUNK, BLOCK = 2**20, 2**24  # bytes per read, and bytes per request to an object store
PREFETCH_THREADS = 2
HTTP = ("http://", "https://")
# HTTP status codes that are not retried. 404 becomes FileNotFoundError; other codes may be
# temporary.
FINAL_STATUS = (401, 403, 405, 410, 451)
# Keeps fsspec's file systems alive. fsspec drops them in a forked child, where their finalizer
# takes a second. The finalizer would also remove the parent's idle connections from the event queue
# that both processes share. Then the parent would never see an answer on these connections.
_alive: set[Any] = set()
Job = tuple[str, "int | None", "str | None"]  # url, size, sha256
_caches: weakref.WeakSet[ShardCache] = weakref.WeakSet()
_hub_answers = False  # the model hub has answered this process or the one it was forked from


def _start_in_child() -> None:
    """Reset the counters and threads of all caches in a forked process."""
    for cache in list(_caches):
        cache._start()


os.register_at_fork(after_in_child=_start_in_child)


def is_remote(path: str) -> bool:
    """Check if a path is a URL; `file://` counts as one."""
    return "://" in path


def expand(url: str) -> list[str]:
    """Expand a URL to a list of shards: {000..123} braces, "*" patterns, folders of tars.

    Raises DataError if there are none, or if the protocol needs a package that is not installed.
    """
    _meet_hub(url)
    fs, path = filesystem(url, LIST_PATIENCE)
    if "{" in url:
        from webdataset.shardlists import expand_urls

        try:
            parts = expand_urls(url)
        except (ValueError, AssertionError) as error:
            raise DataError(f"{url} cannot be expanded: {error}") from error
        shards = [shard for part in parts for shard in expand(part)]
        if len(set(shards)) < len(shards):
            raise DataError(f"{url} names a shard twice, or two that differ only in credentials")
        return shards
    if "*" not in url:
        if not url.endswith("/") and url.partition("?")[0].endswith(".tar"):
            return [url]
        return expand(url.rstrip("/") + "/*.tar")
    if hub.is_hub(url):
        fs.invalidate_cache()
    with suppress(FileNotFoundError):
        names = retry(url, LIST_PATIENCE, lambda: fs.glob(path))
        if names := [name for name in names if not is_system_file(name)]:
            return sorted(conceal(fs.unstrip_protocol(name)) for name in names)
    raise DataError(f"no shards at {url}")


def fetch_small(url: str, patience: float, fresh: bool = False) -> bytes | None:
    """Download a small file to memory, None if it does not exist; raises DataError.

    fresh: forget the listing of its folder that fsspec may remember.
    """
    _meet_hub(url)
    if fresh:
        filesystem(url, patience)[0].invalidate_cache()
    with suppress(FileNotFoundError):
        body = retry(url, patience, lambda: _stream(url, io.BytesIO(), None, patience))
        return body.getvalue()
    return None


def fetch_file(url: str, target: Path, patience: float) -> str:
    """Download a file atomically and return its sha256.

    Only one process at a time may write to a target. Raises FileNotFoundError if there is no such
    file, and DataError if it cannot be downloaded within `patience` seconds.
    """
    with replacing(target) as temporary:

        def download() -> str:
            with _HashedFile(temporary, sys.maxsize, "") as body:
                _stream(url, body, None, patience)
            return body.digest.hexdigest()

        return retry(url, patience, download)


def _meet_hub(url: str) -> None:
    """Raise DataError if a URL is on the model hub, and the hub has never answered this process.

    Later on, and for shards, its silence is a temporary error.
    """
    global _hub_answers
    if hub.is_hub(url) and not _hub_answers:
        if silence := hub.silence():
            raise DataError(f"{url} cannot be fetched: {silence}")
        _hub_answers = True


class ShardCache:
    """Least-recently-used cache of downloaded shards in a folder of at most `limit` bytes.

    Processes may share the folder, and may fork at any time. `misses` counts the calls of `fetch`
    in this process that downloaded a shard; `hits` counts the other calls, including those that
    waited for another process to download it.
    """

    def __init__(self, folder: Path, limit: int, patience: float) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience
        self._start()
        _caches.add(self)

    def create(self) -> Path:
        """Create the folder, before the first file is written, and return it.

        Raises DataError if it cannot be created.
        """
        make_folder(self.folder, "the shard cache", "data.cache (--cache)")
        return self.folder

    def _start(self) -> None:
        """Initialize the state of this process; a fork leaves threads and counts in the parent."""
        self.hits = self.misses = 0
        self._closed = False
        self._ahead: set[str] = set()  # URLs queued or being downloaded by the threads
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # Threads and locks cannot be pickled: a spawned worker creates new ones.
        return _unpickled, (self.folder, self.limit, self.patience, remembered())

    def fetch(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Return the local path of a shard; it is downloaded if it is not in the cache.

        Another process may evict the file before the caller opens it: on FileNotFoundError, fetch
        it again. Raises DataError for a shard that does not exist, is larger than the cache, or
        cannot be downloaded within `patience` seconds.
        """
        hit = self._obtain(url, size, sha256)
        self.hits += hit
        self.misses += not hit
        return self._path(url)

    def forget(self, url: str) -> None:
        """Delete a shard from the cache, so that the next `fetch` downloads it again."""
        self._path(url).unlink(missing_ok=True)

    def prefetch(self, url: str, size: int | None = None, sha256: str | None = None) -> None:
        """Download a shard in a background thread; errors are raised only by a later `fetch`."""
        if url not in self._ahead:
            self._ahead.add(url)
            self._jobs.put((url, size, sha256))
            if len(self._workers) < PREFETCH_THREADS:
                # Daemon threads, because exit would wait for the threads of a ThreadPoolExecutor.
                self._workers.append(threading.Thread(target=self._fetch_ahead, daemon=True))
                self._workers[-1].start()

    def _fetch_ahead(self) -> None:
        while True:
            url, size, sha256 = self._jobs.get()
            try:
                if not self._closed:
                    self._obtain(url, size, sha256)
            except (DataError, OSError) as error:
                log.debug("prefetch failed: %s", error)
            finally:
                self._ahead.discard(url)

    def close(self) -> None:
        """Cancel the prefetches that have not started."""
        self._closed = True

    def _path(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(conceal(url).encode()).hexdigest()[:32]}.tar"

    def _obtain(self, url: str, size: int | None, sha256: str | None) -> bool:
        """Make sure that a shard is in the folder; returns False if this call downloaded it."""
        self.create()
        path = self._path(url)
        if _touch(path, size):
            return True
        lock = path.with_suffix(".lock")
        lock.touch()
        before = lock.read_text("utf-8")
        with locked(lock):
            if _touch(path, size):
                return True
            # If many processes wait for one shard, only the first one retries it. If that one
            # fails, the others raise its error.
            if (after := lock.read_text("utf-8")) != before:
                raise DataError(after.partition("\n")[2])
            try:
                retry(f"shard {url}", self.patience, lambda: self._download(url, size, sha256))
            except DataError as error:
                with suppress(OSError):  # on a full disk, still raise the first error
                    lock.write_text(f"{uuid.uuid4()}\n{error}", "utf-8")
                raise
        self._evict(keep=path)
        return False

    def _download(self, url: str, size: int | None, sha256: str | None) -> None:
        path = self._path(url)
        temporary = path.with_suffix(".tmp")  # a fixed name, as the lock allows one writer
        too_large = f"shard {url} is larger than the whole cache: raise data.cache_gb"
        if size is not None and size > self.limit:
            raise DataError(too_large)
        try:
            with replacing(path, temporary):
                with _HashedFile(temporary, self.limit, too_large) as body:
                    _stream(url, body, size, self.patience)
                if sha256 is not None and body.digest.hexdigest() != sha256.lower():
                    raise OSError(f"sha256 is {body.digest.hexdigest()}, expected {sha256}")
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
                # The writer of a temporary file holds its lock. If the lock is free, it has died.
                lock = locked(temporary.with_suffix(".lock"), fcntl.LOCK_NB)
                with suppress(BlockingIOError), lock:
                    temporary.unlink(missing_ok=True)


def _unpickled(folder: Path, limit: int, patience: float, known: Any) -> ShardCache:
    remember(known)
    return ShardCache(folder, limit, patience)


class _HashedFile(io.BufferedWriter):
    """Output file that hashes what is written, and raises DataError above `limit` bytes."""

    def __init__(self, path: Path, limit: int, too_large: str) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.digest, self._limit, self._too_large = hashlib.sha256(), limit, too_large

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self._limit:
            raise DataError(self._too_large)
        self.digest.update(data)
        return super().write(data)


def _touch(path: Path, size: int | None) -> bool:
    """Mark a shard as just used; returns False if its file is missing or has another size."""
    with suppress(FileNotFoundError):
        if size is None or path.stat().st_size == size:
            os.utime(path)
            return True
    return False


def filesystem(url: str, patience: float) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it, with the URL's credentials.

    Raises DataError.
    """
    options: dict[str, Any] = {}
    try:
        from fsspec.core import url_to_fs

        if hub.is_hub(url):
            hub.parse_address(url)

        if url.startswith(HTTP):
            from aiohttp import ClientTimeout

            read_timeout = min(READ_TIMEOUT, max(patience, 1.0))
            timeout = ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT, sock_read=read_timeout
            )
            # Uncompressed, so that size and sha256 can be compared.
            headers = {"Accept-Encoding": "identity"}
            options["client_kwargs"] = {"timeout": timeout, "headers": headers, "trust_env": True}
        fs, path = url_to_fs(reveal(url), **options)
    except ImportError as error:
        missing = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        raise DataError(f"{url} needs a package: pip install {missing.name}") from error
    except ConfigError as error:
        raise DataError(str(error)) from error
    except ValueError as error:
        raise DataError(redact(f"{url} cannot be opened: {error}")) from error
    _alive.add(fs)
    return fs, path


def _stream(url: str, body: Body, size: int | None, patience: float) -> Body:
    """Download a URL into an open file; raises OSError if its size is not the expected one."""
    fs, path = filesystem(url, patience)
    if url.startswith(HTTP):
        # One GET, checked against its Content-Length. `open` would request the size first, report
        # any failure of that request as a missing file, and leave error responses unread.
        fs.get_file(path, body)
    else:  # other file systems may not accept an open file in `get_file`
        size = fs.size(path) if size is None else size
        block = 0 if hub.is_hub(url) else BLOCK  # 0: the hub sends a file in one request
        with fs.open(path, block_size=block) as stream:
            shutil.copyfileobj(stream, body, CHUNK)
    if size not in (None, body.tell()):
        raise OSError(f"received {body.tell():,} bytes, expected {size:,}")
    return body


def retry(what: str, patience: float, attempt: Callable[[], T]) -> T:
    """Call `attempt` until it succeeds, with exponential backoff; return its result.

    what: name for messages. Raises DataError on a permanent error or after `patience` seconds.
    FileNotFoundError and DataError are not retried.
    """
    start, wait, tries = time.monotonic(), FIRST_WAIT, 1
    while True:
        try:
            return attempt()
        except (DataError, FileNotFoundError) as error:
            if advice := hub.advice(error):  # the repository is missing, not only the file
                raise DataError(f"{redact(what)} cannot be fetched: {advice}") from error
            raise
        except Exception as error:  # each protocol's package has its own error types
            (cause, final), spent = _explain(error), time.monotonic() - start
            if final or spent >= patience:
                after = "" if final else f" after {tries} tries in {spent:.0f} s"
                raise DataError(f"{redact(what)} cannot be fetched{after}: {cause}") from error
        # The global generator belongs to the run, and forked processes share its state.
        pause = min(wait * random.SystemRandom().uniform(0.5, 1.5), patience - spent)
        wait, tries = min(2 * wait, LONGEST_WAIT), tries + 1
        if threading.main_thread().is_alive():  # connections lost at exit are not worth a warning
            log.warning("%s: %s; try %d in %.1f s", redact(what), cause, tries, pause)
        time.sleep(pause)


def _explain(error: Exception) -> tuple[str, bool]:
    """Return (cause in one line, True for a permanent error)."""
    aiohttp = sys.modules.get("aiohttp")  # if it is not imported, the error is not from it
    if aiohttp is not None and isinstance(error, aiohttp.ClientResponseError):
        return f"HTTP {error.status} {error.message}", error.status in FINAL_STATUS
    if advice := hub.advice(error):
        return advice, True
    text = " ".join(str(error).split()) or error.__cause__  # fsspec's timeouts have no text
    final = isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError))
    return redact(f"{type(error).__name__}: {text}"), final
