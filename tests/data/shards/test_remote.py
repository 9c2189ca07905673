"""Shards at URLs, against a real HTTP server that fails on demand."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import hashlib
import itertools
import logging
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from shards import Clock

from data_pipelines.shards import remote
from data_pipelines.shards.remote import ShardCache, expand, fetch_small, is_remote
from xray.errors import DataError

FORK = multiprocessing.get_context("fork")
BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
LIMIT = 10_000_000
PATIENCE = 60.0  # seconds, of the clock below


async def settle() -> None:
    """Let the client handle all that it has received, and all timers that are due."""
    for _ in range(100):
        await asyncio.sleep(0)


def skip(seconds: float) -> None:
    """Move the clock by which the client of this process times out."""
    from fsspec.asyn import get_loop

    loop = get_loop()
    asyncio.run_coroutine_threadsafe(settle(), loop).result()
    before = loop.time
    loop.time = lambda: before() + seconds
    asyncio.run_coroutine_threadsafe(settle(), loop).result()


def waiters(lock: Path) -> int:
    """Count the threads and processes that wait for a file lock."""
    lines = Path("/proc/locks").read_text().splitlines()
    return sum("->" in line and f":{lock.stat().st_ino} " in line for line in lines)


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; before that, the next of server.faults for the path."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.seen.append(f"HEAD {self.path}")
        self.answer(501, b"")

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        self.server.encodings.add(self.headers["Accept-Encoding"])
        body = self.server.files.get(self.path)
        fault = next(self.server.faults.get(self.path, iter(())), "")
        if fault.isdigit():
            self.answer(int(fault), b"no" * 1000)
        elif body is None:
            self.answer(404, b"nothing here")
        elif fault == "wrong":
            self.answer(200, bytes(len(body)))
        elif fault == "slow start":
            skip(0.7 * remote.READ_TIMEOUT)
            self.answer(200, body)
        elif fault == "stall":
            skip(1.1 * remote.READ_TIMEOUT)
            self.close_connection = True
        elif fault == "held 503":
            self.server.go.wait()
            self.answer(503, b"no")
        else:
            self.answer(200, body, fault)

    def answer(self, status: int, body: bytes, fault: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "text/html" if body[:1] == b"<" else "application/x-tar")
        self.end_headers()
        half = len(body) // 2
        if fault == "cut":
            self.wfile.write(body[:half])
            self.close_connection = True
        elif fault == "stall half-way":
            self.wfile.write(body[:half])
            skip(1.1 * remote.READ_TIMEOUT)
            self.close_connection = True
        elif fault == "held half-way":
            self.wfile.write(body[:half])
            self.server.go.wait()
            self.wfile.write(body[half:])
        elif fault == "drip":
            for start in range(0, len(body), len(body) // 5):
                self.wfile.write(body[start : start + len(body) // 5])
                skip(0.7 * remote.READ_TIMEOUT)
        else:
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Local, on a free port; `seen` are the paths asked for, in order; `go` ends what is held."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {f"/{name}.tar": BODY for name in "abcdefgh"}
        self.faults: dict[str, Iterator[str]] = {}
        self.seen: list[str] = []
        self.encodings: set[str | None] = set()
        self.go = threading.Event()
        self.root = f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, path: str, faults: Iterable[str]) -> str:
        self.faults[path] = iter(faults)
        return self.root + path

    def handle_error(self, *args: object) -> None:  # a client that was killed
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.go.set()
    running.shutdown()
    running.server_close()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    caplog.set_level(logging.WARNING, "xray")  # whatever a test before this one made it
    made = Clock()
    monkeypatch.setattr(remote, "time", made)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ShardCache]:
    made = ShardCache(tmp_path / "cache", LIMIT, PATIENCE)
    yield made
    made.close()


def names(cache: ShardCache) -> list[str]:
    """What is in the folder but locks."""
    return sorted(p.name for p in cache.folder.iterdir() if p.suffix != ".lock")


def at(cache: ShardCache, url: str) -> Path:
    return cache.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.01)


def test_is_remote() -> None:
    assert all(map(is_remote, ("http://h/a.tar", "s3://b/{0..9}.tar", "file:///a", "memory://a")))
    assert not any(map(is_remote, ("/data/a.tar", "images", "{0..9}.tar", "c:/a")))


def test_a_shard_is_downloaded_once(server: Server, cache: ShardCache) -> None:
    url = server.root + "/a.tar"
    path = cache.fetch(url)
    assert path == at(cache, url)
    assert path.read_bytes() == BODY
    os.utime(path, (1, 1))
    assert cache.fetch(url, len(BODY), SHA256) == path
    assert path.stat().st_mtime > 1  # a hit is a use
    assert (cache.hits, cache.misses) == (1, 1)
    assert server.seen == ["/a.tar"]  # a single GET, without a HEAD before it
    assert server.encodings == {"identity"}  # else size and sha256 would be of what is sent
    assert names(cache) == [path.name]


@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        (["503", "503", "503"], "HTTP 503 Service Unavailable"),
        (["429"], "HTTP 429"),
        (["cut", "cut"], "not completed"),
        (["stall"], "Timeout on reading"),
        (["stall half-way"], "Timeout on reading"),
        (["wrong", "wrong"], "sha256"),
    ],
)
def test_what_fails_in_passing_is_tried_again(
    faults: list[str],
    cause: str,
    server: Server,
    cache: ShardCache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = server.fail("/a.tar", faults)
    random.seed(7)
    state = random.getstate()
    sha256 = SHA256 if "wrong" in faults else None  # a cut body is noticed without size and sha256
    assert cache.fetch(url, sha256=sha256).read_bytes() == BODY
    assert len(server.seen) == len(faults) + 1
    warnings = [r.getMessage() for r in caplog.records if r.name == "xray"]
    assert len(warnings) == len(faults)
    for number, line in enumerate(warnings, 2):
        assert url in line and cause in line and f"try {number} in 0." in line
    assert names(cache) == [at(cache, url).name]
    assert random.getstate() == state  # the run's own random numbers are not used up


def test_a_slow_start_is_no_failure(server: Server, cache: ShardCache) -> None:
    assert cache.fetch(server.fail("/a.tar", ["slow start"])).read_bytes() == BODY
    assert len(server.seen) == 1


def test_a_slow_body_may_take_longer_than_a_read(server: Server, cache: ShardCache) -> None:
    assert cache.fetch(server.fail("/a.tar", ["drip"])).read_bytes() == BODY
    assert len(server.seen) == 1


def test_waits_grow_and_end_with_patience(
    server: Server, cache: ShardCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 4.0)
    url = server.fail("/a.tar", itertools.repeat("503"))
    with pytest.raises(DataError) as caught:
        cache.fetch(url)
    assert sum(clock.waits) == clock.now == pytest.approx(PATIENCE)
    assert len(server.seen) == len(clock.waits) + 1
    for number, wait in enumerate(clock.waits[:-1]):  # the last one is what is left
        assert 0.5 <= wait / min(4.0 * 2**number, remote.LONGEST_WAIT) <= 1.5
    tries = f"after {len(server.seen)} tries in 60 s: HTTP 503 Service Unavailable"
    assert str(caught.value) == f"shard {url} cannot be fetched {tries}"


def test_the_proxy_of_the_environment_is_used(
    server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://shards.invalid/a.tar"
    server.files[url] = BODY  # the whole url is what a proxy is asked for
    monkeypatch.setenv("http_proxy", server.root)
    assert cache.fetch(url).read_bytes() == BODY


def test_a_server_that_is_away(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.tar"
        with pytest.raises(DataError, match=r"after \d+ tries in 60 s: .*Cannot connect"):
            ShardCache(tmp_path, LIMIT, PATIENCE).fetch(url)
        for folder in ("/shards/", "/shards/*.tar"):  # not an empty folder
            with pytest.raises(DataError, match="Cannot connect"):
                expand(url.replace("/a.tar", folder))


@pytest.mark.parametrize(
    ("fault", "line"),
    [("404", "shard {} does not exist"), ("403", "shard {} cannot be fetched: HTTP 403 Forbidden")],
)
def test_what_cannot_succeed_fails_at_once(
    fault: str, line: str, server: Server, cache: ShardCache
) -> None:
    url = server.fail("/a.tar", itertools.repeat(fault))
    for tries in (1, 2):  # and a later call asks again
        with pytest.raises(DataError) as caught:
            cache.fetch(url)
        assert str(caught.value) == line.format(url)
        assert len(server.seen) == tries
    assert names(cache) == []


@pytest.mark.parametrize(
    ("size", "sha256", "cause"),
    [(len(BODY) + 1, None, "300,000 bytes where 300,001"), (None, "0" * 64, f"sha256 {SHA256}")],
)
def test_another_file_is_not_taken(
    size: int | None, sha256: str | None, cause: str, server: Server, cache: ShardCache
) -> None:
    with pytest.raises(DataError, match=cause):
        cache.fetch(server.root + "/a.tar", size, sha256)
    assert len(server.seen) > 1
    assert names(cache) == []


def test_a_shard_of_a_new_size_replaces_the_old(server: Server, cache: ShardCache) -> None:
    url = server.root + "/a.tar"
    cache.fetch(url, len(BODY))
    server.files["/a.tar"] = BODY[:1000]
    assert cache.fetch(url).stat().st_size == len(BODY)  # nothing says that it changed
    assert cache.fetch(url, 1000).read_bytes() == BODY[:1000]
    assert len(server.seen) == 2


def fetch_in(folder: Path, *urls: str) -> tuple[int, int, str]:
    """For a process of its own: hits, misses and the last error."""
    cache, failure = ShardCache(folder, LIMIT // 10, PATIENCE), ""
    for url in urls:
        try:
            assert cache.fetch(url).read_bytes() == BODY
        except FileNotFoundError:
            failure = "evicted"
        except DataError as error:
            failure = str(error)
    return cache.hits, cache.misses, failure


def test_many_processes_download_a_shard_once(server: Server, tmp_path: Path) -> None:
    url = server.fail("/a.tar", ["503", "held half-way"])
    lock = at(ShardCache(tmp_path, LIMIT, PATIENCE), url).with_suffix(".lock")
    with ProcessPoolExecutor(6, FORK) as pool:
        jobs = [pool.submit(fetch_in, tmp_path, url) for _ in range(6)]
        until(lambda: lock.exists() and waiters(lock) == 5)
        server.go.set()
        counts = sorted(job.result() for job in jobs)
    assert counts == [(0, 1, "")] + 5 * [(1, 0, "")]
    assert len(server.seen) == 2


def test_processes_that_wait_share_the_failure(server: Server, tmp_path: Path) -> None:
    url = server.fail("/a.tar", itertools.chain(["held 503"], itertools.repeat("503")))
    lock = at(ShardCache(tmp_path, LIMIT, PATIENCE), url).with_suffix(".lock")
    with ProcessPoolExecutor(4, FORK) as pool:
        jobs = [pool.submit(fetch_in, tmp_path, url) for _ in range(4)]
        until(lambda: lock.exists() and waiters(lock) == 3)
        server.go.set()
        failures = {job.result()[2] for job in jobs}
    assert len(failures) == 1 and f"after {len(server.seen)} tries" in failures.pop()


def test_processes_that_evict_at_once(server: Server, tmp_path: Path) -> None:
    urls = [f"{server.root}/{name}.tar" for name in "abcdefgh"]  # 2.4 MB, of which 1 MB may stay
    with ProcessPoolExecutor(4, FORK) as pool:
        jobs = [pool.submit(fetch_in, tmp_path, *urls[i:], *urls[:i]) for i in range(4)]
        assert {job.result()[2] for job in jobs} <= {"", "evicted"}
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_the_shard_used_longest_ago_is_evicted(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * len(BODY), PATIENCE)
    a, b, c, d = (f"{server.root}/{name}.tar" for name in "abcd")
    for use, left in ((a, {a}), (b, {a, b}), (a, {a, b}), (c, {a, c}), (d, {c, d}), (a, {a, d})):
        time.sleep(0.02)  # some file systems keep time in steps of hundredths
        cache.fetch(use)
        assert set(names(cache)) == {at(cache, url).name for url in left}
    assert (cache.hits, cache.misses) == (1, 5)
    for path in cache.folder.glob("*.tar"):
        os.utime(path, (2e9, 2e9))  # a clock that was ahead
    cache.fetch(b)
    assert at(cache, b).exists() and len(names(cache)) == 2


@pytest.mark.parametrize("size", [None, len(BODY)])
def test_a_shard_larger_than_the_cache(size: int | None, server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, len(BODY) - 1, PATIENCE)
    server.files["/small.tar"] = b"small"
    small = cache.fetch(server.root + "/small.tar")
    with pytest.raises(DataError, match=r"a\.tar is over the whole cache: raise data\.cache_gb"):
        cache.fetch(server.root + "/a.tar", size)
    assert server.seen == ["/small.tar"] + ["/a.tar"] * (size is None)
    assert names(cache) == [small.name]


def test_a_killed_download_harms_nobody(server: Server, cache: ShardCache, clock: Clock) -> None:
    url = server.fail("/a.tar", ["held half-way"])
    temporary = at(cache, url).with_suffix(".tmp")
    child = FORK.Process(target=cache.fetch, args=(url,))
    child.start()
    until(lambda: temporary.exists() and temporary.stat().st_size > 0)
    other = server.root + "/b.tar"
    cache.fetch(other)
    assert temporary.exists()  # its writer lives
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert temporary.exists()
    cache.fetch(server.root + "/c.tar")
    assert not temporary.exists()  # cleaned up by whoever comes next
    temporary.write_bytes(bytes(2 * len(BODY)))
    assert cache.fetch(url).read_bytes() == BODY
    assert clock.waits == []
    assert not temporary.exists()
    assert server.seen == ["/a.tar", "/b.tar", "/c.tar", "/a.tar"]


def test_other_protocols(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    (tmp_path / "a.tar").write_bytes(BODY)
    MemoryFileSystem().pipe_file("/shards/a.tar", BODY)
    for url in (f"file://{tmp_path}/a.tar", "memory://shards/a.tar"):
        assert cache.fetch(url, sha256=SHA256).read_bytes() == BODY
        with pytest.raises(DataError, match=r"b\.tar does not exist"):
            cache.fetch(url.replace("a.tar", "b.tar"))
    with pytest.raises(DataError, match="cannot be fetched: IsADirectoryError"):
        cache.fetch(f"file://{tmp_path}")
    monkeypatch.setattr(MemoryFileSystem, "size", lambda *_: len(BODY) + 1)
    with pytest.raises(DataError, match="300,000 bytes where 300,001"):
        ShardCache(tmp_path / "b", LIMIT, PATIENCE).fetch("memory://shards/a.tar")


def test_prefetch(server: Server, cache: ShardCache) -> None:
    a, b, c = (
        server.fail("/a.tar", ["held half-way"]),
        server.root + "/b.tar",
        server.root + "/none.tar",
    )
    for url in (a, a, b, a, c):
        cache.prefetch(url)
    until(at(cache, b).exists)
    assert not at(cache, a).exists()
    arriving = at(cache, a).with_suffix(".tmp").stat()
    with ThreadPoolExecutor(1) as pool:  # waits for the prefetch, and does not fetch again
        fetched = pool.submit(cache.fetch, a)
        until(lambda: waiters(at(cache, a).with_suffix(".lock")) == 1)
        server.go.set()
        assert fetched.result().read_bytes() == BODY
    assert at(cache, a).stat().st_ino == arriving.st_ino  # renamed, so never seen in part
    cache.prefetch(a)
    with pytest.raises(DataError, match="does not exist"):
        cache.fetch(c)
    assert (cache.hits, cache.misses) == (1, 0)
    assert server.seen.count("/a.tar") == 1
    assert server.seen.count("/b.tar") == 1


def test_a_failed_prefetch_is_not_reported(
    server: Server, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.fail("/a.tar", ["404"])
    with caplog.at_level(logging.DEBUG, "xray"):
        cache.prefetch(url)
        until(lambda: bool(caplog.records))
    assert [r.levelname for r in caplog.records] == ["DEBUG"]
    assert "does not exist" in caplog.records[0].getMessage()
    until(lambda: url not in cache._ahead)
    cache.prefetch(url)  # may be asked for again
    until(at(cache, url).exists)


def test_close_drops_what_is_queued(server: Server, cache: ShardCache) -> None:
    for name in "abc":
        cache.prefetch(server.fail(f"/{name}.tar", ["held half-way"]))
    until(lambda: len(server.seen) == remote.PREFETCH_THREADS)
    cache.close()
    server.go.set()
    until(lambda: not cache._ahead)
    assert len(server.seen) == len(names(cache)) == remote.PREFETCH_THREADS


def test_exit_does_not_wait_for_a_prefetch(server: Server, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from data_pipelines.shards import remote\n"
        "remote.READ_TIMEOUT = 1e6\n"
        "cache = remote.ShardCache(Path(sys.argv[1]), 10**9, 1e6)\n"
        "for url in sys.argv[2:]: cache.prefetch(url)\n"
        "sys.stdin.read()\n"
    )
    urls = [server.fail(f"/{name}.tar", ["held half-way"]) for name in "abc"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), *urls],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    until(lambda: len(server.seen) == remote.PREFETCH_THREADS)
    _, errors = child.communicate()  # closes its stdin: it goes to its end, though all is held
    assert (child.returncode, errors) == (0, "")
    assert len(server.seen) == remote.PREFETCH_THREADS


def forked_fetch(cache: ShardCache, fetched: str, ahead: str) -> None:
    assert (cache.hits, cache.misses) == (0, 0)
    assert cache.fetch(fetched).read_bytes() == BODY
    cache.prefetch(ahead)
    until(at(cache, ahead).exists)
    cache.fetch(ahead)
    assert (cache.hits, cache.misses) == (1, 1)


def test_fetching_before_and_after_a_fork(
    server: Server, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c, d, e = (f"{server.root}/{name}.tar" for name in "abcde")
    assert fetch_small(a, PATIENCE) == cache.fetch(a).read_bytes() == BODY
    # Both threads of the parent are busy, and the third url queued, when it forks.
    slow = [server.fail(f"/{name}.tar", ["held half-way"]) for name in "fgh"]
    for url in slow:
        cache.prefetch(url)
    until(lambda: {"/f.tar", "/g.tar"} <= set(server.seen) or {"/h.tar"} <= set(server.seen))
    child = FORK.Process(target=forked_fetch, args=(cache, b, c))
    child.start()
    child.join()
    assert child.exitcode == 0
    server.go.set()
    for url in (d, e, *slow):
        assert cache.fetch(url).read_bytes() == BODY
    assert sorted(server.seen) == sorted(["/a.tar", *(f"/{name}.tar" for name in "abcdefgh")])
    assert not [r for r in caplog.records if r.name == "xray"]  # no try failed


def fetch_and_collect(cache: ShardCache, url: str, closed: list[object]) -> None:
    cache.fetch(url)
    gc.collect()
    assert not closed


def test_a_fork_leaves_connections_alone(
    server: Server,
    cache: ShardCache,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fsspec.implementations.http import HTTPFileSystem

    closed: list[object] = []
    close = HTTPFileSystem.close_session
    noted = staticmethod(lambda *of: (closed.append(of), close(*of)))
    monkeypatch.setattr(HTTPFileSystem, "close_session", noted)
    monkeypatch.setattr(remote, "READ_TIMEOUT", 59.0)  # which no session has yet
    cache.fetch(server.fail("/a.tar", ["503", "cut", "stall"]))
    caplog.clear()
    for mine, other in (("/b.tar", "/c.tar"), ("/d.tar", "/e.tar")):
        child = FORK.Process(target=fetch_and_collect, args=(cache, server.root + other, closed))
        child.start()
        child.join()
        assert child.exitcode == 0
        cache.fetch(server.root + mine)  # over a connection from before the fork
    assert server.seen[4:] == ["/c.tar", "/b.tar", "/e.tar", "/d.tar"]
    assert not caplog.records


def test_a_lock_does_not_stay_with_a_forked_child(tmp_path: Path) -> None:
    with remote.locked(tmp_path / "lock"):
        child = FORK.Process(target=time.sleep, args=(3600,))
        child.start()
        with pytest.raises(BlockingIOError), remote.locked(tmp_path / "lock", fcntl.LOCK_NB):
            pass
    with remote.locked(tmp_path / "lock", fcntl.LOCK_NB):
        child.kill()


def test_a_cache_goes_to_spawned_workers(server: Server, cache: ShardCache) -> None:
    cache.prefetch(server.root + "/a.tar")
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.folder, copy.limit, copy.patience) == (cache.folder, cache.limit, cache.patience)
    assert copy.fetch(server.root + "/a.tar").read_bytes() == BODY


def test_fetch_small(server: Server, tmp_path: Path) -> None:
    server.files["/index"] = b"rows"
    assert fetch_small(server.fail("/index", ["503", "cut"]), PATIENCE) == b"rows"
    assert len(server.seen) == 3
    assert fetch_small(server.root + "/none", PATIENCE) is None
    assert fetch_small(f"file://{tmp_path}/none", PATIENCE) is None
    (tmp_path / "index").write_bytes(b"local")
    assert fetch_small(f"file://{tmp_path}/index", PATIENCE) == b"local"
    url = server.fail("/index", itertools.repeat("500"))
    with pytest.raises(DataError, match=r"/index cannot be fetched after \d+ tries .*: HTTP 500"):
        fetch_small(url, PATIENCE)


def test_expand_braces_without_asking(server: Server) -> None:
    url = server.root + "/{train,val}-{00..02}.tar"
    parts = [f"{server.root}/{split}-0{i}.tar" for split in ("train", "val") for i in range(3)]
    assert expand(url) == parts
    assert expand(server.root + "/a.tar?key=1") == [server.root + "/a.tar?key=1"]
    assert not server.seen
    with pytest.raises(DataError, match="Unbalanced braces"):
        expand(server.root + "/{0..9.tar")


def test_expand_folders_and_patterns(tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    root = f"file://{tmp_path}"
    for name in ("y/1.tar", "x/1.tar", "x/0.tar", "x/0.tar.index.npz", "x/.tar", "z/notes.txt"):
        MemoryFileSystem().pipe_file(f"/expand/{name}", b"")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for base in (root, "memory:///expand"):
        in_x = [f"{base}/x/.tar", f"{base}/x/0.tar", f"{base}/x/1.tar"]
        assert expand(f"{base}/x/") == expand(f"{base}/x") == expand(f"{base}/x/*.tar") == in_x
        assert expand(f"{base}/x/1*") == [f"{base}/x/1.tar"]
        assert expand(f"{base}/*/1.tar") == [f"{base}/x/1.tar", f"{base}/y/1.tar"]
        assert expand(f"{base}/{{y,x}}/1*.tar") == [f"{base}/y/1.tar", f"{base}/x/1.tar"]
        for nothing in (f"{base}/z/", f"{base}/nowhere", f"{base}/x/2*.tar", f"{base}/{{x,z}}/"):
            with pytest.raises(DataError, match=r"no shards at .*\.tar$"):
                expand(nothing)


def test_expand_lists_a_web_folder(server: Server) -> None:
    links = "".join(f'<a href="{name}">{name}</a>' for name in ("b.tar", "a.tar", "a.txt", "../"))
    server.files["/shards/"] = f"<html>{links}</html>".encode()
    url = server.fail("/shards/", ["503"])
    found = [url + "a.tar", url + "b.tar"]
    assert expand(url) == expand(url + "*.tar") == expand(url.rstrip("/")) == found
    with pytest.raises(DataError, match="no shards at"):
        expand(server.root + "/nowhere/")
    with pytest.raises(DataError, match="HTTP 503"):
        expand(server.fail("/shards/", itertools.repeat("503")))


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("http", "aiohttp")):
        monkeypatch.delitem(_registry, scheme, raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=f"^{scheme}://.* needs .*: pip install {package}$"):
            expand(f"{scheme}://bucket/{{0..9}}.tar")
    with pytest.raises(DataError, match="Protocol not known: s4"):
        expand("s4://bucket/a.tar")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be made: .*Not a directory"):
        ShardCache(tmp_path / "file" / "cache", LIMIT, 1.0)
