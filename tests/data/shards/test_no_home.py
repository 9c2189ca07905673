"""Local shards need no cache: a home that cannot be written stops no command on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from in_process import invoke

from data_pipelines.shards import side_files
from data_pipelines.shards.source import make_cache, open_source
from xray.config import DataConfig
from xray.errors import DataError


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that not even root can create: it is below a file."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    return tmp_path


@pytest.fixture
def shards(homeless: Path, demo: Path) -> Path:
    """A copy of the demo's photos without indexes."""
    folder = homeless / "photos"
    folder.mkdir()
    for tar in (demo / "photos").glob("*.tar"):
        shutil.copy(tar, folder)
    return folder


def test_commands_on_local_shards_create_no_cache(shards: Path, tagger: Path) -> None:
    for command in (
        ["data", "check", shards],
        ["data", "index", shards],
        ["data", "stats", shards, "--out", shards.parent / "stats.html"],
        ["embed", tagger, shards, "--out", shards.parent / "x.parquet"],
    ):
        done = invoke(*command)
        assert done.exit_code == 0, (command, done.output)
    assert (shards / ".xray" / "shards.manifest").is_file()


@pytest.mark.parametrize("command", ["check", "embed", "index"])
def test_read_only_shards_without_a_cache_are_read(
    shards: Path, tagger: Path, command: str
) -> None:
    shards.chmod(0o555)
    try:
        if command == "embed":
            done = invoke("embed", tagger, shards, "--out", shards.parent / "x.parquet")
            assert "cannot be kept beside the data" in done.output
        else:
            done = invoke("data", command, shards)
        told = "set XDG_CACHE_HOME to a folder you can write to"
        assert (done.exit_code, told in done.output) == {
            "check": (0, False), "embed": (0, True), "index": (2, True),
        }[command], done.output  # fmt: skip
        whole = open_source("a", str(shards), "image")
        assert whole.read(0, 0) and not list(shards.rglob("*.index"))
    finally:
        shards.chmod(0o755)


def test_a_remote_source_names_the_key(homeless: Path, demo: Path) -> None:
    url = f"file://{demo}/photos"
    with pytest.raises(DataError, match=r"shard cache .*; set data\.cache .*to a folder you can"):
        open_source("a", url, "image", cache=make_cache(DataConfig()))
    assert len(open_source("a", url, "image", cache=make_cache(DataConfig(cache=str(homeless)))))


def test_a_user_without_a_home_has_a_cache_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(side_files.Path, "home", none)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert side_files.user_cache("index") == Path("/.cache/xray/index")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert side_files.user_cache("index") == Path("/.cache/xray/index")
