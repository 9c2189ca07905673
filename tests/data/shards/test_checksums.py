"""Indexes, manifests and side files that are damaged, or of a version without checksums."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import invoke
from shards import jpeg, without_checksum, write_tar

from data_pipelines.shards import columns
from data_pipelines.shards.columns import open_columns, save_columns
from data_pipelines.shards.manifest import load_manifest, write_manifest
from data_pipelines.shards.side_files import hidden_path
from data_pipelines.shards.sidecar import open_sidecar, open_whole, write_sidecar
from data_pipelines.shards.source import Source, open_source
from data_pipelines.shards.tar_index import index_shard, load_index
from data_pipelines.text.feature_store import TextStore
from xray.errors import DataError


@pytest.fixture
def photos(tmp_path: Path) -> Source:
    folder = tmp_path / "photos"
    folder.mkdir()
    for shard in range(2):
        files = {}
        for key in range(3):
            files |= {f"{shard}{key}.jpg": jpeg(), f"{shard}{key}.json": b'{"n": %d}' % key}
        write_tar(folder / f"{shard}.tar", files)
    return open_source("photos", str(folder), "image")


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def test_any_flipped_bit_of_a_table_is_found(tmp_path: Path) -> None:
    path = tmp_path / "table"
    table = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.array([7, 8], np.int64)}
    facts = {"version": 1, "name": "x", "empty": []}
    save_columns(path, table, facts)
    whole = path.read_bytes()
    unchanged = 0
    for at in range(len(whole)):
        for bit in (1, 32):  # 32 makes another letter of a letter
            path.write_bytes(whole)
            flip(path, at, bit)
            columns._verify.cache_clear()  # a file system may give the same time to two writes
            try:
                found, found_facts = open_columns(path)
            except ValueError as error:
                assert str(path) in str(error)
                continue
            # Some bits have no meaning: spaces at the end of the header, and the key "checksum",
            # without which the file is one of an older version.
            assert facts.items() <= found_facts.items()
            assert all(np.array_equal(found[name], column) for name, column in table.items())
            unchanged += 1
    assert unchanged < 40


def test_wrong_places_in_an_index_are_found(
    photos: Source, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise other bytes of the tar become a sample's json."""
    path = hidden_path(Path(f"{photos.manifest.path(0)}.index"))
    expected = index_shard(photos.manifest.path(0)).read(1)
    table, _ = open_columns(path)
    offsets = np.array(table["offsets"]).tobytes()
    flip(path, path.read_bytes().index(offsets) + 8 * 2 + 1, 2)  # by 512 bytes
    assert load_index("0.tar", [path]) is None
    assert "0.tar.index is damaged: its content does not have its checksum" in caplog.text
    source = open_source("photos", photos.manifest.folder, "image")
    assert source.read(0, 1) == expected  # indexed again
    assert load_index("0.tar", [path]) is not None


def test_places_outside_of_the_tar_are_found_without_checksum(photos: Source) -> None:
    path = hidden_path(Path(f"{photos.manifest.path(0)}.index"))
    table, _ = open_columns(path)
    for name, value in (("offsets", 1 << 40), ("offsets", -7), ("sizes", 1 << 62), ("key_ends", 1)):
        before, wrong = path.read_bytes(), np.array(table[name])
        wrong.reshape(-1)[-1] = value
        without_checksum(path, {name: wrong})
        assert load_index("0.tar", [path]) is None, (name, value)
        path.write_bytes(before)
    without_checksum(path)
    assert load_index("0.tar", [path]) is not None


def test_files_of_an_older_version_are_opened_with_one_line(
    photos: Source, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(photos.manifest.folder)
    expected = [photos.sample(*place, 8, 1) for place in photos.places()]
    for path in (*folder.glob(".xray/*.index"), folder / ".xray/shards.manifest"):
        without_checksum(path)
    caplog.clear()
    old = open_source("photos", str(folder), "image")
    assert old.digest == photos.digest
    assert [old.sample(*place, 8, 1) for place in old.places()] == expected
    lines = [line for line in caplog.messages if "without checksums" in line]
    assert len(lines) == 2 and any(f"{folder}/.xray/*.index:" in line for line in lines)
    caplog.clear()
    assert invoke("data", "index", folder).exit_code == 0
    columns._warn_of_no_checksum.cache_clear()
    caplog.clear()
    new = open_source("photos", str(folder), "image")
    assert new.digest == photos.digest and new.read(0, 0) == expected[0].files
    assert not caplog.messages


def test_a_damaged_manifest_is_written_again(
    photos: Source, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(photos.manifest.folder) / ".xray" / "shards.manifest"
    table, _ = open_columns(path)
    counts = np.array(table["counts"]).tobytes()
    flip(path, path.read_bytes().index(counts), 2)  # 1 image instead of 3
    assert load_manifest(photos.manifest.folder, path) is None
    assert open_source("photos", photos.manifest.folder, "image").counts.tolist() == [3, 3]
    assert "shards.manifest is damaged" in caplog.text


def rows(shard: int) -> dict[str, Any]:
    members = np.arange(3, dtype=np.int32)
    return {"members": members, "copies": 0 * members + shard}


def test_a_damaged_side_file_stops_its_reader(photos: Source) -> None:
    write_sidecar(photos, "slots-x", rows, {"seed": 1})
    path = photos.derived("slots-x", 1)
    whole = path.read_bytes()
    flip(path, len(whole) - 1)
    sidecar = open_sidecar(photos, "slots-x")
    assert sidecar is not None and sidecar.table(0)["members"].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"1\.tar\.slots-x is missing, damaged or made from"):
        sidecar.table(1)
    assert open_whole(photos, "slots-x") is None
    write_sidecar(photos, "slots-x", rows, {"seed": 1})  # only the damaged one is written
    assert path.read_bytes() == whole and open_whole(photos, "slots-x") is not None
    flip(photos.derived("slots-x"), 300)
    assert open_sidecar(photos, "slots-x") is None


def stored(shard: int) -> dict[str, Any]:
    """Return the text features of three samples: a vector each."""
    places = np.arange(3, dtype=np.int64) + (shard << 32)
    vectors = np.eye(3, 4, dtype=np.float32) * (shard + 1)
    ends, scales = np.arange(1, 4, dtype=np.int64), np.ones(3, np.float32)
    return {"places": places, "ends": ends, "vectors": vectors, "scales": scales}


def test_changed_places_of_text_features_are_found(photos: Source) -> None:
    """Otherwise a sample is trained with the caption of another."""
    write_sidecar(photos, "text-features-x", stored, {"width": 4})
    path = photos.derived("text-features-x", 1)
    store = TextStore(write_sidecar(photos, "text-features-x", stored, {"width": 4}))
    assert store.vectors(1, 2, [0]).tolist() == [[0, 0, 2, 0]]
    flip(path, path.read_bytes().index(stored(1)["places"].tobytes()) + 16, 3)  # 2 becomes 1
    sidecar = open_sidecar(photos, "text-features-x")
    assert sidecar is not None
    with pytest.raises(DataError, match=r"1\.tar\.text-features-x is missing, damaged"):
        TextStore(sidecar).vectors(1, 2, [0])
    assert TextStore(sidecar).vectors(0, 2, [0]).tolist() == [[0, 0, 1, 0]]


def test_a_file_is_verified_once(photos: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = photos.derived("table"), []
    real = columns._checksum
    monkeypatch.setattr(columns, "_checksum", lambda *args: read.append(1) or real(*args))
    save_columns(path, rows(0), {})
    for _ in range(3):
        open_columns(path)
    assert len(read) == 2  # once to write it, once to verify it


def test_what_was_left_out_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "xray")
    for shard in range(2):
        files = {"._a.jpg": b"m", "a.jpg": jpeg(), "b.JPG": jpeg(), "b.jpg": jpeg()}
        write_tar(tmp_path / f"{shard}.tar", files)
    write_manifest(str(tmp_path))
    assert caplog.messages == [
        f"{tmp_path}: members of tars left out: 2 x file replaced by a later one of its name "
        "(first b.jpg in 0.tar); 2 x system or hidden file (first ._a.jpg in 0.tar)"
    ]
