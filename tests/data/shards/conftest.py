"""Fixtures of the tests of remote shards."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import CACHE_BYTES, PATIENCE, FaultServer
from shards import Clock

from data_pipelines.shards import remote
from data_pipelines.shards.remote import ShardCache


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock by which `remote` waits between tries."""
    made = Clock()
    monkeypatch.setattr(remote, "time", made)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return made


@pytest.fixture
def faulty(clock: Clock, caplog: pytest.LogCaptureFixture) -> Iterator[FaultServer]:
    """Run a server with faults, which the client tries again without real waits."""
    caplog.set_level(logging.WARNING, "xray")  # an earlier test may have changed it
    running = FaultServer()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.go.set()
    running.shutdown()
    running.server_close()


@pytest.fixture
def cache(clock: Clock, tmp_path: Path) -> Iterator[ShardCache]:
    """Make an empty cache of 10 MB."""
    made = ShardCache(tmp_path / "cache", CACHE_BYTES, PATIENCE)
    yield made
    made.close()
