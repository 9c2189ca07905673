"""Side files: one hidden folder beside the shards, the old places, and the user's cache."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from shards import jpeg, two_shards, write_tar

from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.user_data import open_data
from data_pipelines.shards import remote_index
from data_pipelines.shards.manifest import write_manifest
from data_pipelines.shards.remote import ShardCache
from data_pipelines.shards.side_files import HIDDEN, hidden_path, possible_paths
from data_pipelines.shards.sidecar import finish_sidecar, open_sidecar, write_sidecar
from data_pipelines.shards.source import Source, open_source


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return two_shards(tmp_path / "shards")


def opened(folder: Path) -> Source:
    source = open_source("s", str(folder), "image")
    for shard in range(2):
        source.index(shard)
    return source


def rows(shard: int) -> dict[str, np.ndarray]:
    members = np.arange(3, dtype=np.int32)
    return {"members": members, "copies": 0 * members + shard}


def moved_out(folder: Path) -> None:
    """Put the side files where versions before the hidden folder wrote them."""
    for path in (folder / HIDDEN).iterdir():
        path.rename(folder / path.name)
    (folder / HIDDEN).rmdir()


def states(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_new_side_files_are_in_one_hidden_folder(shards: Path) -> None:
    shards.chmod(0o770)
    write_sidecar(opened(shards), "slots-x", rows, {})
    assert sorted(path.name for path in shards.iterdir()) == [HIDDEN, "0.tar", "1.tar"]
    names = {path.name for path in (shards / HIDDEN).iterdir()}
    assert {"0.tar.index", "1.tar.index", "shards.manifest", "0.tar.slots-x"} < names
    assert stat.S_IMODE((shards / HIDDEN).stat().st_mode) == 0o770  # a group shares the data


def test_files_at_the_old_places_are_used_and_renewed_there(shards: Path) -> None:
    source = opened(shards)
    write_sidecar(source, "slots-x", rows, {})
    moved_out(shards)
    before = states(shards)
    again = opened(shards)
    assert again.digest == source.digest
    sidecar = open_sidecar(again, "slots-x")
    assert sidecar is not None and sidecar.table(1)["copies"].tolist() == [1, 1, 1]
    write_sidecar(again, "slots-x", lambda shard: pytest.fail("computed twice"), {})
    assert states(shards).keys() == before.keys()
    kept = {name for name in before if not name.endswith("slots-x")}
    assert {name: states(shards)[name] for name in kept} == {name: before[name] for name in kept}
    write_tar(shards / "0.tar", {"z.jpg": jpeg(), "y.jpg": jpeg()})
    assert len(opened(shards)) == 5 and not (shards / HIDDEN).exists()


def test_a_sidecar_may_be_at_both_places(shards: Path) -> None:
    source = opened(shards)
    write_sidecar(source, "slots-x", rows, {})
    for name in ("0.tar.slots-x", "0.tar.index"):
        (shards / HIDDEN / name).rename(shards / name)
    sidecar = open_sidecar(opened(shards), "slots-x")
    assert sidecar is not None
    assert [sidecar.table(n)["copies"].tolist() for n in (0, 1)] == [[0] * 3, [1] * 3]
    assert finish_sidecar(source, "slots-x", {}).digest == sidecar.digest


def test_a_read_only_folder_is_read_and_the_cache_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = opened(shards)
    shards.chmod(0o555)
    try:
        before = states(shards)
        beside = shards / "0.tar.index"
        *read, write = possible_paths(beside)
        assert read == [beside, hidden_path(beside)]
        assert write.parent == tmp_path / "cache" / "xray" / "index"
        assert opened(shards).digest == first.digest and not (tmp_path / "cache").exists()
        write_sidecar(first, "slots-x", rows, {})
        assert open_sidecar(first, "slots-x") is not None
        assert len([*write.parent.iterdir()]) == 3 and states(shards) == before
    finally:
        shards.chmod(0o755)


def test_newer_files_in_the_cache_win_over_those_that_cannot_be_renewed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened(shards)
    write_tar(shards / "2.tar", {"z.jpg": jpeg()})
    for name in ("0.tar", "1.tar"):  # copied without their times
        os.utime(shards / name, (1e9, 1e9))
    for folder in (shards / HIDDEN, shards):
        folder.chmod(0o555)
    try:
        source = open_data(str(shards), Request("s"))  # of any modality: opened twice
        assert len(source) == 7
        assert len(open_source("s", str(shards), "image", known=source.manifest.state)) == 7
        assert [len(source.read(shard, 0)) for shard in range(3)] == [1, 1, 1]
    finally:
        for folder in (shards, shards / HIDDEN):
            folder.chmod(0o755)


def test_a_hidden_folder_of_someone_else_is_left_alone(shards: Path) -> None:
    opened(shards)
    (shards / HIDDEN).chmod(0o555)
    try:
        beside = shards / "0.tar.index"
        assert possible_paths(beside) == [hidden_path(beside), beside]
    finally:
        (shards / HIDDEN).chmod(0o755)


@pytest.mark.parametrize("place", ["beside", "hidden", "forbidden"])
def test_published_side_files_are_found_at_both_places(
    place: str,
    server: tuple[str, Path, list[str]],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, folder, seen = server
    shutil.copytree(shards, folder / "s")
    write_manifest(str(folder / "s"), checksum=True)
    if place == "beside":
        moved_out(folder / "s")
    elif place == "forbidden":  # as web servers do with hidden files
        shutil.rmtree(folder / "s" / HIDDEN)
        real = remote_index.fetch_small

        def refused(url: str, patience: float) -> bytes | None:
            if HIDDEN in url:
                try:
                    raise PermissionError("403 Forbidden")
                except PermissionError as error:
                    raise remote_index.DataError("refused") from error
            return real(url, patience)

        monkeypatch.setattr(remote_index, "fetch_small", refused)
    source = open_source("s", f"{url}/s/", "image", cache=ShardCache(tmp_path / "cache", 10**9, 5))
    assert source.read(1, 2)
    gets = list(dict.fromkeys(line[4:] for line in seen if line.startswith("GET")))
    if place == "forbidden":
        assert sorted(g for g in gets if g.endswith(".tar")) == ["/s/0.tar", "/s/1.tar"]
        return
    assert (
        gets
        == {
            "beside": ["/s/shards.manifest", "/s/1.tar.index", "/s/1.tar"],
            "hidden": [
                *("/s/shards.manifest", "/s/.xray/shards.manifest"),
                *("/s/.xray/1.tar.index", "/s/1.tar"),
            ],
        }[place]
    )
