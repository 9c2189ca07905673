"""The cache of remote shards: processes that share it, eviction, prefetch and forks."""

from __future__ import annotations

import fcntl
import gc
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_server import (
    BODY,
    CACHE_BYTES,
    PATIENCE,
    FaultServer,
    cached_names,
    cached_path,
    wait_until,
    waiters,
)
from shards import Clock

from data_pipelines.shards import remote
from data_pipelines.shards.remote import ShardCache, fetch_small
from xray.errors import DataError

FORK = multiprocessing.get_context("fork")


def test_a_shard_of_another_size_is_downloaded_again(
    faulty: FaultServer, cache: ShardCache
) -> None:
    url = faulty.root + "/a.tar"
    cache.fetch(url, len(BODY))
    faulty.files["/a.tar"] = BODY[:1000]
    assert cache.fetch(url).stat().st_size == len(BODY)  # no size is expected, so it is a hit
    assert cache.fetch(url, 1000).read_bytes() == BODY[:1000]
    assert len(faulty.seen) == 2


def fetch_in(folder: Path, *urls: str) -> tuple[int, int, str]:
    """Run in another process; return hits, misses and the last error."""
    cache, failure = ShardCache(folder, CACHE_BYTES // 10, PATIENCE), ""
    for url in urls:
        try:
            assert cache.fetch(url).read_bytes() == BODY
        except FileNotFoundError:
            failure = "evicted"
        except DataError as error:
            failure = str(error)
    return cache.hits, cache.misses, failure


def test_many_processes_download_a_shard_once(faulty: FaultServer, tmp_path: Path) -> None:
    url = faulty.fail("/a.tar", ["503", "held half-way"])
    lock = cached_path(ShardCache(tmp_path, CACHE_BYTES, PATIENCE), url).with_suffix(".lock")
    with ProcessPoolExecutor(6, FORK) as pool:
        jobs = [pool.submit(fetch_in, tmp_path, url) for _ in range(6)]
        wait_until(lambda: lock.exists() and waiters(lock) == 5)
        faulty.go.set()
        counts = sorted(job.result() for job in jobs)
    assert counts == [(0, 1, "")] + 5 * [(1, 0, "")]
    assert len(faulty.seen) == 2


def test_waiting_processes_share_the_error(faulty: FaultServer, tmp_path: Path) -> None:
    url = faulty.fail("/a.tar", itertools.chain(["held 503"], itertools.repeat("503")))
    lock = cached_path(ShardCache(tmp_path, CACHE_BYTES, PATIENCE), url).with_suffix(".lock")
    with ProcessPoolExecutor(4, FORK) as pool:
        jobs = [pool.submit(fetch_in, tmp_path, url) for _ in range(4)]
        wait_until(lambda: lock.exists() and waiters(lock) == 3)
        faulty.go.set()
        failures = {job.result()[2] for job in jobs}
    assert len(failures) == 1 and f"after {len(faulty.seen)} tries" in failures.pop()


def test_processes_may_evict_at_the_same_time(faulty: FaultServer, tmp_path: Path) -> None:
    urls = [f"{faulty.root}/{name}.tar" for name in "abcdefgh"]  # 2.4 MB in a cache of 1 MB
    with ProcessPoolExecutor(4, FORK) as pool:
        jobs = [pool.submit(fetch_in, tmp_path, *urls[i:], *urls[:i]) for i in range(4)]
        assert {job.result()[2] for job in jobs} <= {"", "evicted"}
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_the_least_recently_used_shard_is_evicted(faulty: FaultServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * len(BODY), PATIENCE)
    a, b, c, d = (f"{faulty.root}/{name}.tar" for name in "abcd")
    for used, left in ((a, {a}), (b, {a, b}), (a, {a, b}), (c, {a, c}), (d, {c, d}), (a, {a, d})):
        time.sleep(0.02)  # some file systems store times in steps of 10 ms
        cache.fetch(used)
        assert set(cached_names(cache)) == {cached_path(cache, url).name for url in left}
    assert (cache.hits, cache.misses) == (1, 5)
    for path in cache.folder.glob("*.tar"):
        os.utime(path, (2e9, 2e9))  # as from a clock that was ahead
    cache.fetch(b)
    assert cached_path(cache, b).exists() and len(cached_names(cache)) == 2


@pytest.mark.parametrize("size", [None, len(BODY)])
def test_a_shard_larger_than_the_cache(
    size: int | None, faulty: FaultServer, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path, len(BODY) - 1, PATIENCE)
    faulty.files["/small.tar"] = b"small"
    small = cache.fetch(faulty.root + "/small.tar")
    with pytest.raises(
        DataError, match=r"a\.tar is larger than the whole cache: raise data\.cache_gb"
    ):
        cache.fetch(faulty.root + "/a.tar", size)
    assert faulty.seen == ["/small.tar"] + ["/a.tar"] * (size is None)
    assert cached_names(cache) == [small.name]


def test_a_killed_download_is_cleaned_up(
    faulty: FaultServer, cache: ShardCache, clock: Clock
) -> None:
    url = faulty.fail("/a.tar", ["held half-way"])
    temporary = cached_path(cache, url).with_suffix(".tmp")
    child = FORK.Process(target=cache.fetch, args=(url,))
    child.start()
    wait_until(lambda: temporary.exists() and temporary.stat().st_size > 0)
    other = faulty.root + "/b.tar"
    cache.fetch(other)
    assert temporary.exists()  # its writer is alive
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert temporary.exists()
    cache.fetch(faulty.root + "/c.tar")
    assert not temporary.exists()  # removed by the next download
    temporary.write_bytes(bytes(2 * len(BODY)))
    assert cache.fetch(url).read_bytes() == BODY
    assert clock.waits == []
    assert not temporary.exists()
    assert faulty.seen == ["/a.tar", "/b.tar", "/c.tar", "/a.tar"]


def test_prefetch(faulty: FaultServer, cache: ShardCache) -> None:
    a = faulty.fail("/a.tar", ["held half-way"])
    b, c = faulty.root + "/b.tar", faulty.root + "/none.tar"
    for url in (a, a, b, a, c):
        cache.prefetch(url)
    wait_until(cached_path(cache, b).exists)
    assert not cached_path(cache, a).exists()
    arriving = cached_path(cache, a).with_suffix(".tmp").stat()
    with ThreadPoolExecutor(1) as pool:  # waits for the prefetch instead of downloading again
        fetched = pool.submit(cache.fetch, a)
        wait_until(lambda: waiters(cached_path(cache, a).with_suffix(".lock")) == 1)
        faulty.go.set()
        assert fetched.result().read_bytes() == BODY
    # The same file, renamed when complete.
    assert cached_path(cache, a).stat().st_ino == arriving.st_ino
    cache.prefetch(a)
    with pytest.raises(DataError, match="does not exist"):
        cache.fetch(c)
    assert (cache.hits, cache.misses) == (1, 0)
    assert faulty.seen.count("/a.tar") == 1
    assert faulty.seen.count("/b.tar") == 1


def test_a_failed_prefetch_is_only_logged(
    faulty: FaultServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    url = faulty.fail("/a.tar", ["404"])
    with caplog.at_level(logging.DEBUG, "xray"):
        cache.prefetch(url)
        wait_until(lambda: bool(caplog.records))
    assert [r.levelname for r in caplog.records] == ["DEBUG"]
    assert "does not exist" in caplog.records[0].getMessage()
    wait_until(lambda: url not in cache._ahead)
    cache.prefetch(url)  # a failed URL may be prefetched again
    wait_until(cached_path(cache, url).exists)


def test_close_cancels_queued_prefetches(faulty: FaultServer, cache: ShardCache) -> None:
    for name in "abc":
        cache.prefetch(faulty.fail(f"/{name}.tar", ["held half-way"]))
    wait_until(lambda: len(faulty.seen) == remote.PREFETCH_THREADS)
    cache.close()
    faulty.go.set()
    wait_until(lambda: not cache._ahead)
    assert len(faulty.seen) == len(cached_names(cache)) == remote.PREFETCH_THREADS


def test_exit_does_not_wait_for_a_prefetch(faulty: FaultServer, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from data_pipelines.shards import remote\n"
        "remote.READ_TIMEOUT = 1e6\n"
        "cache = remote.ShardCache(Path(sys.argv[1]), 10**9, 1e6)\n"
        "for url in sys.argv[2:]: cache.prefetch(url)\n"
        "sys.stdin.read()\n"
    )
    urls = [faulty.fail(f"/{name}.tar", ["held half-way"]) for name in "abc"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), *urls],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    wait_until(lambda: len(faulty.seen) == remote.PREFETCH_THREADS)
    _, errors = child.communicate()  # closes its stdin, so it exits in spite of the held downloads
    assert (child.returncode, errors) == (0, "")
    assert len(faulty.seen) == remote.PREFETCH_THREADS


def forked_fetch(cache: ShardCache, fetched: str, ahead: str) -> None:
    """Run in a forked process: fetch one shard, prefetch another and fetch it."""
    assert (cache.hits, cache.misses) == (0, 0)
    assert cache.fetch(fetched).read_bytes() == BODY
    cache.prefetch(ahead)
    wait_until(cached_path(cache, ahead).exists)
    cache.fetch(ahead)
    assert (cache.hits, cache.misses) == (1, 1)


def test_fetch_before_and_after_a_fork(
    faulty: FaultServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c, d, e = (f"{faulty.root}/{name}.tar" for name in "abcde")
    assert fetch_small(a, PATIENCE) == cache.fetch(a).read_bytes() == BODY
    # At the fork, both threads of the parent are busy and the third URL is queued.
    slow = [faulty.fail(f"/{name}.tar", ["held half-way"]) for name in "fgh"]
    for url in slow:
        cache.prefetch(url)
    wait_until(lambda: {"/f.tar", "/g.tar"} <= set(faulty.seen) or {"/h.tar"} <= set(faulty.seen))
    child = FORK.Process(target=forked_fetch, args=(cache, b, c))
    child.start()
    child.join()
    assert child.exitcode == 0
    faulty.go.set()
    for url in (d, e, *slow):
        assert cache.fetch(url).read_bytes() == BODY
    assert sorted(faulty.seen) == sorted(["/a.tar", *(f"/{name}.tar" for name in "abcdefgh")])
    assert not [r for r in caplog.records if r.name == "xray"]  # no retry was logged


def fetch_and_collect(cache: ShardCache, url: str, closed: list[object]) -> None:
    """Run in a forked process: fetch a shard, and check that no session of the parent is closed."""
    cache.fetch(url)
    gc.collect()
    assert not closed


def test_a_fork_does_not_break_idle_connections(
    faulty: FaultServer,
    cache: ShardCache,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fsspec.implementations.http import HTTPFileSystem

    closed: list[object] = []
    close = HTTPFileSystem.close_session
    recorded = staticmethod(lambda *args: (closed.append(args), close(*args)))
    monkeypatch.setattr(HTTPFileSystem, "close_session", recorded)
    monkeypatch.setattr(remote, "READ_TIMEOUT", 59.0)  # makes a new session
    cache.fetch(faulty.fail("/a.tar", ["503", "cut", "stall"]))
    caplog.clear()
    for here, in_child in (("/b.tar", "/c.tar"), ("/d.tar", "/e.tar")):
        child = FORK.Process(target=fetch_and_collect, args=(cache, faulty.root + in_child, closed))
        child.start()
        child.join()
        assert child.exitcode == 0
        cache.fetch(faulty.root + here)  # over a connection that was opened before the fork
    assert faulty.seen[4:] == ["/c.tar", "/b.tar", "/e.tar", "/d.tar"]
    assert not caplog.records


def test_a_forked_child_does_not_keep_a_lock(tmp_path: Path) -> None:
    with remote.locked(tmp_path / "lock"):
        child = FORK.Process(target=time.sleep, args=(3600,))
        child.start()
        with pytest.raises(BlockingIOError), remote.locked(tmp_path / "lock", fcntl.LOCK_NB):
            pass
    with remote.locked(tmp_path / "lock", fcntl.LOCK_NB):
        child.kill()


def test_a_cache_can_be_pickled(faulty: FaultServer, cache: ShardCache) -> None:
    cache.prefetch(faulty.root + "/a.tar")
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.folder, copy.limit, copy.patience) == (cache.folder, cache.limit, cache.patience)
    assert copy.fetch(faulty.root + "/a.tar").read_bytes() == BODY


def test_a_cache_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be created: .*Not a directory.*; set data.cache"):
        ShardCache(tmp_path / "file" / "cache", CACHE_BYTES, PATIENCE).fetch(
            "http://127.0.0.1/a.tar"
        )
