"""HTTP server with faults, and helpers for tests of the shard cache."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_pipelines.shards import remote
from data_pipelines.shards.remote import ShardCache

BODY = random.Random(0).randbytes(300_000)  # content of each of the eight shards
SHA256 = hashlib.sha256(BODY).hexdigest()
CACHE_BYTES = 10_000_000
PATIENCE = 60.0  # seconds of the fake clock


async def settle() -> None:
    """Let the client handle all that it has received, and all timers that are due."""
    for _ in range(100):
        await asyncio.sleep(0)


def skip(seconds: float) -> None:
    """Advance the clock that the client of this process uses for its timeouts."""
    from fsspec.asyn import get_loop

    loop = get_loop()
    asyncio.run_coroutine_threadsafe(settle(), loop).result()
    before = loop.time
    loop.time = lambda: before() + seconds
    asyncio.run_coroutine_threadsafe(settle(), loop).result()


class FaultHandler(BaseHTTPRequestHandler):
    """Request handler that serves `server.files`, after the next fault in `server.faults[path]`."""

    protocol_version = "HTTP/1.1"
    server: FaultServer

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


class FaultServer(ThreadingHTTPServer):
    """HTTP server on a free local port that can fail on demand.

    files: path -> body. faults: path -> faults of its next requests. seen: paths in request order.
    go: event that releases the held responses.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FaultHandler)
        self.files: dict[str, bytes] = {f"/{name}.tar": BODY for name in "abcdefgh"}
        self.faults: dict[str, Iterator[str]] = {}
        self.seen: list[str] = []
        self.encodings: set[str | None] = set()
        self.go = threading.Event()
        self.root = f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, path: str, faults: Iterable[str]) -> str:
        """Set the faults of the next requests of a path; return its URL."""
        self.faults[path] = iter(faults)
        return self.root + path

    def handle_error(self, *args: object) -> None:  # for example, the client was killed
        pass


def cached_names(cache: ShardCache) -> list[str]:
    """List the files in the folder of a cache, without locks."""
    return sorted(p.name for p in cache.folder.iterdir() if p.suffix != ".lock")


def cached_path(cache: ShardCache, url: str) -> Path:
    """Return the path of a shard in a cache."""
    return cache.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"


def waiters(lock: Path) -> int:
    """Count the threads and processes that wait for a file lock."""
    lines = Path("/proc/locks").read_text().splitlines()
    return sum("->" in line and f":{lock.stat().st_ino} " in line for line in lines)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    while not condition():
        time.sleep(0.01)
