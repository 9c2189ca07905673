"""Downloads from URLs: retries, errors, protocols, and lists of shards."""

from __future__ import annotations

import itertools
import os
import random
import socket
import sys
from pathlib import Path

import pytest
from fault_server import (
    BODY,
    CACHE_BYTES,
    PATIENCE,
    SHA256,
    FaultServer,
    cached_names,
    cached_path,
)
from shards import Clock

from data_pipelines.shards import remote
from data_pipelines.shards.remote import ShardCache, expand, fetch_small, is_remote
from xray.errors import DataError


def test_is_remote() -> None:
    assert all(map(is_remote, ("http://h/a.tar", "s3://b/{0..9}.tar", "file:///a", "memory://a")))
    assert not any(map(is_remote, ("/data/a.tar", "images", "{0..9}.tar", "c:/a")))


def test_a_shard_is_downloaded_once(faulty: FaultServer, cache: ShardCache) -> None:
    url = faulty.root + "/a.tar"
    path = cache.fetch(url)
    assert path == cached_path(cache, url)
    assert path.read_bytes() == BODY
    os.utime(path, (1, 1))
    assert cache.fetch(url, len(BODY), SHA256) == path
    assert path.stat().st_mtime > 1  # a hit counts as a use
    assert (cache.hits, cache.misses) == (1, 1)
    assert faulty.seen == ["/a.tar"]  # a single GET, without a HEAD before it
    assert faulty.encodings == {"identity"}  # size and sha256 are of the uncompressed file
    assert cached_names(cache) == [path.name]


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
def test_temporary_errors_are_retried(
    faults: list[str],
    cause: str,
    faulty: FaultServer,
    cache: ShardCache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = faulty.fail("/a.tar", faults)
    random.seed(7)
    state = random.getstate()
    # A short body is an error even if neither size nor sha256 is known.
    sha256 = SHA256 if "wrong" in faults else None
    assert cache.fetch(url, sha256=sha256).read_bytes() == BODY
    assert len(faulty.seen) == len(faults) + 1
    warnings = [r.getMessage() for r in caplog.records if r.name == "xray"]
    assert len(warnings) == len(faults)
    for number, line in enumerate(warnings, 2):
        assert url in line and cause in line and f"try {number} in 0." in line
    assert cached_names(cache) == [cached_path(cache, url).name]
    assert random.getstate() == state  # the run's random numbers are not consumed


def test_a_slow_first_byte_is_not_an_error(faulty: FaultServer, cache: ShardCache) -> None:
    assert cache.fetch(faulty.fail("/a.tar", ["slow start"])).read_bytes() == BODY
    assert len(faulty.seen) == 1


def test_a_slow_body_may_take_longer_than_the_read_timeout(
    faulty: FaultServer, cache: ShardCache
) -> None:
    assert cache.fetch(faulty.fail("/a.tar", ["drip"])).read_bytes() == BODY
    assert len(faulty.seen) == 1


def test_waits_double_until_patience_ends(
    faulty: FaultServer, cache: ShardCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 4.0)
    url = faulty.fail("/a.tar", itertools.repeat("503"))
    with pytest.raises(DataError) as caught:
        cache.fetch(url)
    assert sum(clock.waits) == clock.now == pytest.approx(PATIENCE)
    assert len(faulty.seen) == len(clock.waits) + 1
    for number, wait in enumerate(clock.waits[:-1]):  # the last wait is the rest of the patience
        assert 0.5 <= wait / min(4.0 * 2**number, remote.LONGEST_WAIT) <= 1.5
    tries = f"after {len(faulty.seen)} tries in 60 s: HTTP 503 Service Unavailable"
    assert str(caught.value) == f"shard {url} cannot be fetched {tries}"


def test_the_proxy_of_the_environment_is_used(
    faulty: FaultServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://shards.invalid/a.tar"
    faulty.files[url] = BODY  # a proxy gets the whole URL as path
    monkeypatch.setenv("http_proxy", faulty.root)
    assert cache.fetch(url).read_bytes() == BODY


@pytest.mark.usefixtures("clock")
def test_no_server_at_the_address(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # but never listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.tar"
        with pytest.raises(DataError, match=r"after \d+ tries in 60 s: .*Cannot connect"):
            ShardCache(tmp_path, CACHE_BYTES, PATIENCE).fetch(url)
        for folder in ("/shards/", "/shards/*.tar"):  # an error, not an empty folder
            with pytest.raises(DataError, match="Cannot connect"):
                expand(url.replace("/a.tar", folder))


@pytest.mark.parametrize(
    ("fault", "line"),
    [("404", "shard {} does not exist"), ("403", "shard {} cannot be fetched: HTTP 403 Forbidden")],
)
def test_permanent_errors_are_not_retried(
    fault: str, line: str, faulty: FaultServer, cache: ShardCache
) -> None:
    url = faulty.fail("/a.tar", itertools.repeat(fault))
    for tries in (1, 2):  # a later call makes a new request
        with pytest.raises(DataError) as caught:
            cache.fetch(url)
        assert str(caught.value) == line.format(url)
        assert len(faulty.seen) == tries
    assert cached_names(cache) == []


@pytest.mark.parametrize(
    ("size", "sha256", "cause"),
    [
        (len(BODY) + 1, None, "received 300,000 bytes, expected 300,001"),
        (None, "0" * 64, f"sha256 is {SHA256}"),
    ],
)
def test_a_wrong_size_or_sha256_is_refused(
    size: int | None, sha256: str | None, cause: str, faulty: FaultServer, cache: ShardCache
) -> None:
    with pytest.raises(DataError, match=cause):
        cache.fetch(faulty.root + "/a.tar", size, sha256)
    assert len(faulty.seen) > 1
    assert cached_names(cache) == []


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
    with pytest.raises(DataError, match="received 300,000 bytes, expected 300,001"):
        ShardCache(tmp_path / "b", CACHE_BYTES, PATIENCE).fetch("memory://shards/a.tar")


def test_fetch_small(faulty: FaultServer, tmp_path: Path) -> None:
    faulty.files["/index"] = b"rows"
    assert fetch_small(faulty.fail("/index", ["503", "cut"]), PATIENCE) == b"rows"
    assert len(faulty.seen) == 3
    assert fetch_small(faulty.root + "/none", PATIENCE) is None
    assert fetch_small(f"file://{tmp_path}/none", PATIENCE) is None
    (tmp_path / "index").write_bytes(b"local")
    assert fetch_small(f"file://{tmp_path}/index", PATIENCE) == b"local"
    url = faulty.fail("/index", itertools.repeat("500"))
    with pytest.raises(DataError, match=r"/index cannot be fetched after \d+ tries .*: HTTP 500"):
        fetch_small(url, PATIENCE)


def test_expand_braces_without_a_request(faulty: FaultServer) -> None:
    url = faulty.root + "/{train,val}-{00..02}.tar"
    parts = [f"{faulty.root}/{split}-0{i}.tar" for split in ("train", "val") for i in range(3)]
    assert expand(url) == parts
    assert expand(faulty.root + "/a.tar?key=1") == [faulty.root + "/a.tar?key=1"]
    assert not faulty.seen
    with pytest.raises(DataError, match="Unbalanced braces"):
        expand(faulty.root + "/{0..9.tar")


def test_expand_folders_and_patterns(tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    root = f"file://{tmp_path}"
    for name in ("y/1.tar", "x/1.tar", "x/0.tar", "x/0.tar.index.npz", "x/.tar", "z/notes.txt"):
        MemoryFileSystem().pipe_file(f"/expand/{name}", b"")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for base in (root, "memory:///expand"):
        in_x = [f"{base}/x/0.tar", f"{base}/x/1.tar"]  # hidden files are no shards
        assert expand(f"{base}/x/") == expand(f"{base}/x") == expand(f"{base}/x/*.tar") == in_x
        assert expand(f"{base}/x/1*") == [f"{base}/x/1.tar"]
        assert expand(f"{base}/*/1.tar") == [f"{base}/x/1.tar", f"{base}/y/1.tar"]
        assert expand(f"{base}/{{y,x}}/1*.tar") == [f"{base}/y/1.tar", f"{base}/x/1.tar"]
        for nothing in (f"{base}/z/", f"{base}/nowhere", f"{base}/x/2*.tar", f"{base}/{{x,z}}/"):
            with pytest.raises(DataError, match=r"no shards at .*\.tar$"):
                expand(nothing)


def test_expand_lists_a_folder_over_http(faulty: FaultServer) -> None:
    links = "".join(f'<a href="{name}">{name}</a>' for name in ("b.tar", "a.tar", "a.txt", "../"))
    faulty.files["/shards/"] = f"<html>{links}</html>".encode()
    url = faulty.fail("/shards/", ["503"])
    tars = [url + "a.tar", url + "b.tar"]
    assert expand(url) == expand(url + "*.tar") == expand(url.rstrip("/")) == tars
    with pytest.raises(DataError, match="no shards at"):
        expand(faulty.root + "/nowhere/")
    with pytest.raises(DataError, match="HTTP 503"):
        expand(faulty.fail("/shards/", itertools.repeat("503")))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("http", "aiohttp")):
        monkeypatch.delitem(_registry, scheme, raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=f"^{scheme}://.* needs .*: pip install {package}$"):
            expand(f"{scheme}://bucket/{{0..9}}.tar")
    with pytest.raises(DataError, match="Protocol not known: s4"):
        expand("s4://bucket/a.tar")
