"""Shard indexes, manifests and sources, local and remote."""

from __future__ import annotations

import math
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from shards import Clock, jpeg, write_tar

from data_pipelines.ingest.user_data import open_sources
from data_pipelines.shards import manifest as manifests
from data_pipelines.shards import remote
from data_pipelines.shards.columns import open_columns, pack_texts, save_columns, unpack_texts
from data_pipelines.shards.manifest import open_manifest, write_manifest
from data_pipelines.shards.remote import ShardCache
from data_pipelines.shards.shard_list import find_shards
from data_pipelines.shards.sidecar import CopySlots, write_sidecar
from data_pipelines.shards.source import open_source
from data_pipelines.shards.tar_index import index_shard
from xray import dist
from xray.config import DataConfig, SourceConfig
from xray.errors import DataError
from xray.files import sha256_file


def test_columns_are_memory_mapped(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    os.umask(umask)
    texts = ["a", "", "ünï", "x" * 300]
    blob, ends = pack_texts(texts)
    table = np.arange(12).reshape(4, 3)
    save_columns(tmp_path / "t", {"blob": blob, "ends": ends, "table": table}, {"n": 4})
    columns, facts = open_columns(tmp_path / "t")
    # safetensors would create the file with mode 0600
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o666 & ~umask
    assert unpack_texts(columns["blob"], columns["ends"]) == texts and facts == {"n": 4}
    assert np.array_equal(columns["table"], table)
    for column in columns.values():
        while isinstance(column, np.ndarray) and not isinstance(column, np.memmap):
            column = column.base
        assert isinstance(column, np.memmap)
    (tmp_path / "bad").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not a table"):
        open_columns(tmp_path / "bad")


def test_index_reads_the_files_of_the_tar(tmp_path: Path) -> None:
    files = {"a.jpg": jpeg(), "a.txt": b"one", "b.c.jpg": b"x", "b.txt": b"two"}
    path = write_tar(tmp_path / "0.tar", files)
    for _ in range(2):  # first built, then loaded
        index = index_shard(path)
        assert index.keys == ["a", "b"] and index.key(1) == "b"
        assert index.read(0) == {"jpg": files["a.jpg"], "txt": b"one"}
        assert index.read(1) == {"c.jpg": b"x", "txt": b"two"}
    assert (tmp_path / ".xray" / "0.tar.index").is_file()
    assert index_shard(path).facts["sha256"] == ""
    assert index_shard(path, checksum=True).facts["sha256"] == sha256_file(path)
    write_tar(path, {"z.jpg": jpeg(), "z.txt": b"three"})
    assert index_shard(path).keys == ["z"]  # rebuilt when the tar changes


def test_nothing_is_written_to_a_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_tar(folder / "0.tar", {"a.jpg": jpeg()})
    folder.chmod(0o555)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert len(open_source("s", str(folder), "image")) == 1
    assert [p.name for p in folder.iterdir()] == ["0.tar"]
    folder.chmod(0o755)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.tar does not exist"):
        open_source("s", "missing.tar", "image", str(tmp_path))
    with pytest.raises(DataError, match=r"no \.tar shards"):
        find_shards(str(tmp_path / "*.tar"))
    with pytest.raises(DataError, match=r"folder .* does not exist"):
        open_source("s", "nowhere/deep/*.tar", "image", str(tmp_path))
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.tar is empty"):
        index_shard(empty)
    whole = write_tar(tmp_path / "cut.tar", {f"{i}.jpg": jpeg() for i in range(20)})
    whole.write_bytes(whole.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"cut.tar is truncated"):
        index_shard(whole)
    inside = write_tar(tmp_path / "hit.tar", {f"{i}.jpg": jpeg() for i in range(20)})
    offset = 5 * (512 + math.ceil(len(jpeg()) / 512) * 512)  # of the sixth header
    whole_bytes = inside.read_bytes()
    inside.write_bytes(whole_bytes[:offset] + b"\xa5" * 512 + whole_bytes[offset + 512 :])
    damaged = rf"hit.tar is .*damaged.*no header at byte {offset:,}\) after sample '4'"
    with pytest.raises(DataError, match=damaged):  # tarfile alone takes it for the end
        index_shard(inside)
    unended = write_tar(tmp_path / "unended.tar", {f"{i}.jpg": jpeg() for i in range(3)})
    # as if its writer was killed before the end marker
    unended.write_bytes(unended.read_bytes()[: 3 * offset // 5])
    assert len(index_shard(unended)) == 3
    write_tar(tmp_path / "text.tar", {"a.txt": b"only text"})
    with pytest.raises(DataError, match="has no image files, only txt"):
        open_source("s", "text.tar", "image", str(tmp_path))


def test_find_shards(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"{i:05d}.tar", {"a.jpg": jpeg()})
    names = [os.path.basename(p) for p in find_shards(str(tmp_path))]
    assert names == ["00000.tar", "00001.tar", "00002.tar"]
    assert [os.path.basename(p) for p in find_shards(str(tmp_path / "*1.tar"))] == ["00001.tar"]
    braces = find_shards(str(tmp_path / "{00000..00001}.tar"))
    assert [os.path.basename(p) for p in braces] == names[:2]
    write_tar(tmp_path / "a[1]{2}.tar", {"a.jpg": jpeg()})
    assert len(open_manifest(str(tmp_path / "a[1]{2}.tar"))) == 1


def make(folder: Path, shards: int = 3, samples: int = 4) -> Path:
    """Write shards of images with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        files = {}
        for i in range(samples):
            files |= {f"{shard}{i}.jpg": jpeg((shard, i, 0)), f"{shard}{i}.txt": b"x"}
        write_tar(folder / f"{shard:05d}.tar", files)
    return folder


def test_a_manifest_is_reused_until_a_tar_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "s")
    first = open_manifest(str(folder))
    assert first.counts("image", "image").tolist() == [4, 4, 4]
    assert first.counts("video", "image").tolist() == [0, 0, 0]
    built: list[str] = []
    real = manifests.index_shard

    def counted(path: str, checksum: bool = False) -> object:
        built.append(os.path.basename(path))
        return real(path, checksum)

    monkeypatch.setattr(manifests, "index_shard", counted)
    assert open_manifest(str(folder)).digest == first.digest and not built
    write_tar(folder / "00001.tar", {"new.jpg": jpeg()})
    second = open_manifest(str(folder))
    assert second.counts("image", "image").tolist() == [4, 1, 4]
    assert second.digest != first.digest and built
    (folder / "00002.tar").unlink()
    third = open_manifest(str(folder))
    assert len(third) == 2
    (folder / "00001.tar").unlink()
    assert len(open_manifest(str(folder), known=third.state)) == 2  # it is not compared again
    assert len(open_manifest(str(folder), known=second.state)) == 1  # which there is no more


def test_the_digest_does_not_depend_on_where_shards_are(tmp_path: Path) -> None:
    one = open_source("s", str(make(tmp_path / "a")), "image")
    other = shutil.copytree(tmp_path / "a", tmp_path / "b")
    two = open_source("s", "b", "image", str(tmp_path))
    assert one.digest == two.digest
    write_tar(other / "00000.tar", {"k.jpg": jpeg()})
    assert open_source("s", str(other), "image").digest != one.digest
    members = [np.array(row, np.int32) for row in ([0], [1], [])]
    sidecar = write_sidecar(
        one, "x", lambda s: {"members": members[s], "copies": 0 * members[s]}, {}
    )
    narrowed = one.with_slots(CopySlots(sidecar))
    assert narrowed.digest != one.digest and len(narrowed) == 2
    assert list(narrowed.places()) == [(0, 0), (1, 1)]


def test_a_tar_that_changes_during_a_run_is_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "s")
    source = open_source("s", str(folder), "image")
    write_tar(folder / "00002.tar", {"k.jpg": jpeg()})
    with pytest.raises(DataError, match=r"00002.tar changed since it was indexed"):
        source.sample(2, 0, 8, 1)


def test_animations_count_as_configured(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.gif": b"x", "b.jpg": b"x", "c.webp": b"x", "d.mp4": b"x"})
    for animations, images, clips in (("image", "abc", "d"), ("video", "bc", "acd")):
        for modality, expected in (("image", images), ("video", clips)):
            source = open_source("s", str(tmp_path), modality, animations=animations)  # type: ignore[arg-type]
            assert "".join(source.index(s).key(m) for s, m in source.places()) == expected


def test_indexing_in_processes_gives_the_same_digest(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a", 6), make(tmp_path / "b", 6)
    assert write_manifest(str(one)).digest == write_manifest(str(two), workers=2).digest


def test_remote_shards_are_downloaded_once(
    server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    url, folder, seen = server
    make(folder / "s")
    local = open_source("s", str(folder / "s"), "image")
    shutil.rmtree(folder / "s" / ".xray")
    for _ in range(2):
        cache = ShardCache(tmp_path / "cache", 10**9, 600)
        source = open_source("s", "s/{00000..00002}.tar", "image", url, cache=cache)
        for place in source.places():
            assert source.sample(*place, 8, 1) == local.sample(*place, 8, 1)
    gets = [line for line in seen if line.startswith("GET") and line.endswith(".tar")]
    assert sorted(gets) == [f"GET /s/0000{i}.tar" for i in range(3)]


def test_opening_a_remote_manifest_downloads_no_shard(
    server: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "time", Clock())
    url, folder, seen = server
    make(folder / "s")
    write_manifest(str(folder / "s"), checksum=True)
    cache = ShardCache(tmp_path / "cache", 10**9, 600)
    source = open_source("s", f"{url}/s/", "image", cache=cache)
    assert len(source) == 12 and not [line for line in seen if ".tar" in line]
    source.sample(1, 2, 8, 1)
    assert [line for line in seen if ".tar" in line] == [
        "GET /s/.xray/00001.tar.index",  # where its manifest was
        "GET /s/00001.tar",
    ]
    changed = (folder / "s" / "00002.tar").read_bytes().replace(b"21.txt", b"2x.txt")
    (folder / "s" / "00002.tar").write_bytes(changed)
    with pytest.raises(DataError, match=r"00002.tar cannot be fetched.*sha256"):
        source.sample(2, 0, 8, 1)


def test_a_shard_evicted_between_fetch_and_open_is_downloaded_again(
    server: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder, _ = server
    make(folder / "s", shards=1)
    cache = ShardCache(tmp_path / "cache", 10**9, 600)
    source = open_source("s", f"{url}/s/00000.tar", "image", cache=cache)
    real, calls = cache.fetch, []

    def fetch_and_lose(*args: object) -> Path:
        path = real(*args)  # type: ignore[arg-type]
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
        return path

    monkeypatch.setattr(cache, "fetch", fetch_and_lose)
    assert source.sample(0, 1, 8, 1).key == "01" and len(calls) == 2


def test_hosts_with_different_shards_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(sources={"s": SourceConfig(str(make(tmp_path / "a")), "image")})
    assert len(open_sources(config, ["s"])["s"]) == 12
    other = open_source("s", str(make(tmp_path / "b", samples=5)), "image").digest

    monkeypatch.setattr(dist, "gather_objects", lambda value: [value, {"s": other}])
    with pytest.raises(DataError, match=r"source 's' is not the same on all hosts .ranks \[1\]"):
        open_sources(config, ["s"])


def test_dots_in_keys_are_explained(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {f"img_7.{i}.jpg": b"x" for i in range(100)})
    with pytest.raises(DataError, match=r"100 different file extensions.*use keys without dots"):
        index_shard(tmp_path / "0.tar")


def test_remote_shards_uploaded_again_are_indexed_again(
    server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    url, folder, _ = server
    make(folder / "s")
    cache = ShardCache(tmp_path / "cache", 10**9, 600)
    assert len(write_manifest(f"{url}/s/", cache)) == 3
    make(folder / "s", samples=2)
    cache = ShardCache(tmp_path / "cache", 10**9, 600)
    again = write_manifest(f"{url}/s/", cache)
    assert again.counts("image", "image").tolist() == [2, 2, 2]
