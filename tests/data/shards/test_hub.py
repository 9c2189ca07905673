"""Shards on the model hub: `hf://` patterns, and what to do where they cannot be read."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import READER, TOKEN, HubServer, hub_server
from in_process import invoke
from shards import Clock

from data_pipelines.shards.remote import ShardCache, expand, fetch_small
from data_pipelines.shards.source import open_source
from xray.errors import DataError
from xray.hub import Address, parse_address

PICS = "hf://datasets/acme/pics"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that is asked without a token."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with hub_server(monkeypatch) as server:
        yield server


def test_addresses() -> None:
    assert parse_address("hf://a/b") == Address("models", "a/b", "", "")
    assert parse_address("hf://a/b@v1/x.tar") == Address("models", "a/b", "v1", "x.tar")
    of_request = parse_address("hf://datasets/a/b@refs/pr/3/x/y.tar")
    assert of_request == Address("datasets", "a/b", "refs/pr/3", "x/y.tar")


def test_patterns_name_the_shards_of_a_dataset(hub: HubServer) -> None:
    files = {f"x/x-{n:03d}.tar": b"tar" for n in range(3)} | {"x/notes.txt": b"text"}
    hub.add("datasets/acme/pics", files)
    wanted = [f"{PICS}/x/x-{n:03d}.tar" for n in range(3)]
    for pattern in ("x/x-{000..002}.tar", "x/*.tar", "x", "x/"):
        assert expand(f"{PICS}/{pattern}") == wanted
    hub.add("datasets/acme/pics", {"x/x-003.tar": b"tar"})
    assert len(expand(f"{PICS}/x")) == 4  # the listing is not remembered
    hub.add("datasets/acme/pics", {"x/y.tar": b"tar"}, revision="v2")
    assert expand(f"{PICS}@v2/x") == [f"{PICS}@v2/x/y.tar"]


def test_a_shard_is_one_request_and_the_token_goes_to_the_hub_alone(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    body = random.Random(0).randbytes(3 << 20)
    hub.add("datasets/acme/pics", {"a.tar": body}, private=True)
    cache = ShardCache(tmp_path / "cache", 10_000_000, 60.0)
    sha256 = hashlib.sha256(body).hexdigest()
    assert cache.fetch(f"{PICS}/a.tar", len(body), sha256).read_bytes() == body
    loads = [line for line in hub.seen if "/resolve/" in line or "/lfs/" in line]
    assert len(loads) == 2  # the file's page, and the store that it names
    assert not hub.leaks


def test_a_dataset_on_the_hub_is_a_source(hub: HubServer, demo: Path, tmp_path: Path) -> None:
    shards = sorted((demo / "photos").glob("*.tar"))
    hub.add("datasets/acme/pics", {f"photos/{path.name}": path.read_bytes() for path in shards})
    here = open_source("photos", "photos", "image", str(demo))
    there = open_source("photos", f"{PICS}/photos", "image")
    assert there.counts.tolist() == here.counts.tolist()
    assert there.manifest.names == here.manifest.names
    done = invoke("data", "stats", f"{PICS}/photos/*.tar", "--out", tmp_path / "a.html")
    assert done.exit_code == 0, done.output


ACCESS: dict[str, tuple[str, str]] = {  # words of the error -> repository, token
    "acme/none does not exist on the hub, or is private: run `hf auth login`": ("none", ""),
    "acme/none does not exist on the hub, or your token": ("none", READER),
    "accept the conditions on the page of acme/gated, then run `hf auth login`": ("gated", ""),
    "accept the conditions on the page of acme/gated": ("gated", READER),
    "the hub does not accept your token": ("open", "hf_wrong"),
    "the repository has no such revision": ("open@v9", ""),
}


@pytest.mark.parametrize("words", ACCESS)
def test_without_access_one_line_says_what_to_do(
    hub: HubServer, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, token = ACCESS[words]
    monkeypatch.setenv("HF_TOKEN", token)
    hub.add("models/acme/gated", {"manifest.json": b"{}"}, gated=True)
    hub.add("models/acme/open", {"manifest.json": b"{}"})
    with pytest.raises(DataError, match=words) as caught:
        fetch_small(f"hf://acme/{name}/manifest.json", 60.0)
    assert "\n" not in str(caught.value)
    if name != "gated":  # whose names are public
        with pytest.raises(DataError, match=words):
            expand(f"hf://acme/{name}/*.tar")


@pytest.mark.parametrize("address", ["hf://datasets/acme/*.tar", "hf://gpt2", "hf://a b/c"])
def test_an_address_without_a_repository_is_refused_at_once(hub: HubServer, address: str) -> None:
    with pytest.raises(DataError, match="is no address on the hub, such as hf://ORG/NAME"):
        expand(address)


def test_a_silent_hub_is_an_error_at_first_and_waited_for_later(
    hub: HubServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("models/acme/open", {"a.json": b"{}"})
    address = "hf://acme/open/a.json"
    with monkeypatch.context() as gone:
        gone.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(DataError, match="does not answer"):
            fetch_small(address, 600.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        fetch_small(address, 600.0)
    assert not clock.waits
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetch_small(address, 600.0) == b"{}"
    hub.faults["GET /api/models/acme/open"] = [502, 502]
    assert fetch_small(address, 600.0, fresh=True) == b"{}"
    assert len(clock.waits) == 2
