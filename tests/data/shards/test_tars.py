"""Tars as other programs write them, damaged tars, and tars that are made to do harm."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from shards import jpeg, write_tar
from tars import END, header, member, octal, padded, pax, tar_of

from data_pipelines.checks.check_shard import check_shard
from data_pipelines.shards.shard_list import find_shards
from data_pipelines.shards.source import make_cache, open_source
from data_pipelines.shards.tar_contents import read_tar
from data_pipelines.shards.tar_index import ShardIndex, build_index, index_shard
from xray.config import DataConfig
from xray.errors import DataError
from xray.evaluation.feature_extraction import Views, view_pixels
from xray.evaluation.set_features import Data

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def built(folder: Path, content: bytes) -> ShardIndex:
    path = folder / "0.tar"
    path.write_bytes(content)
    return build_index(path)


def samples(index: ShardIndex) -> list[tuple[str, dict[str, bytes]]]:
    return [(key, index.read(number)) for number, key in enumerate(index.keys)]


HOSTILE = {
    "negative pax size": pax({"size": "-1024"}) + member("a.jpg", b"x"),
    "pax size of many digits": pax({"size": "9" * 200_000}) + member("a.jpg", b"x"),
    "pax size beyond the end": pax({"size": "99999999"}) + member("a.jpg", b"x"),
    "pax size that is no number": pax({"size": "1e3"}) + member("a.jpg", b"x"),
    "pax length of many digits": member("x", b"9" * 200_000 + b" path=a\n", b"x")
    + member("a", b""),
    "pax length beyond its header": member("x", b"99 path=a\n", b"x") + member("a.jpg", b"x"),
    "pax length of nothing": member("x", b"3 p\n", b"x") + member("a.jpg", b"x"),
    "pax header longer than the tar": header("x", octal(1 << 32), b"x"),
    "pax header of megabytes": pax({"comment": "c" * (1 << 21)}) + member("a.jpg", b"x"),
    "pax headers of no member": pax({"path": "a.jpg"}) * 5000,
    "pax path for all members": pax({"path": "a.jpg"}, b"g") + member("b.jpg", b"x"),
    "name with a NUL": pax({"path": "a\0.jpg"}) + member("b.jpg", b"x"),
    "size beyond the end": header("a.jpg", octal(1 << 33)) + bytes(512),
    "negative binary size": header("a.jpg", b"\xff" * 12) + bytes(512),
    "large binary size": header("a.jpg", b"\x80" + b"\xff" * 11) + bytes(512),
    "size that is no number": header("a.jpg", b"0_7________\0") + bytes(512),
    "long name longer than the tar": header("x", octal(1 << 34), b"L"),
    "map of a sparse file without end": header("a.jpg", octal(8), b"S")[:482] + b"\1" + bytes(29),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"0\.tar is truncated, damaged") as error:
        built(tmp_path, member("good.jpg", b"g") + HOSTILE[name] + END)
    assert "after sample 'good'" in str(error.value) and len(str(error.value)) < 400


def test_any_flipped_bytes_give_an_index_or_one_error(tmp_path: Path) -> None:
    files = {f"{n}.jpg": bytes([n]) * (300 * n) for n in range(4)} | {
        "ü" * 40 + "/" + "x" * 50 + ".txt": b"long"
    }
    content = b"".join(tar_of(files, form) for form in FORMATS.values())
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(600):
        damaged = bytearray(content[: int(rng.integers(1, len(content) + 1))])
        for at in rng.integers(0, len(damaged), 3):
            damaged[at] = rng.integers(0, 256)
        try:
            index = built(tmp_path, bytes(damaged))
        except DataError:
            refused += 1
            continue
        offsets, sizes = index.columns["offsets"], index.columns["sizes"]
        assert (offsets[sizes >= 0] >= 512).all()
        assert (offsets + sizes <= len(damaged)).all()
    assert 100 < refused < 600


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_as_tarfile_reads_it(tmp_path: Path, form: str) -> None:
    long = "d" * 60 + "/" + "é" * 20 + "/" + "k" * 40
    files = {"a.JPG": b"1" * 513, f"{long}.jpg": b"2", f"{long}.txt": b"", "b.tar.gz": b"3" * 512}
    if form != "ustar":
        files[os.fsdecode(b"\xff\xe9.jpg")] = b"4"
        files[os.fsdecode(b"\xff\xe9.\xe9.txt")] = b"4 4"
        files["n" * 5000 + ".jpg"] = b"5"
    content = tar_of(files, FORMATS[form])
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = {m.name: (m.offset_data, m.size) for m in archive}
    index = built(tmp_path, content)
    places = {}
    for number, key in enumerate(index.keys):
        for column, ending in enumerate(index.extensions):
            place = [int(index.columns[name][number, column]) for name in ("offsets", "sizes")]
            if place[1] >= 0:
                places[f"{key}.{ending}"] = tuple(place)
    expected["a.jpg"] = expected.pop("a.JPG")
    assert places == expected


def test_names_of_files_and_members_need_not_be_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, name = tmp_path / os.fsdecode(b"\xe9"), os.fsdecode(b"\xe9")
    write_tar(folder / f"{name}.tar", {f"{name}.jpg": jpeg()})
    folder.chmod(0o555)
    try:
        source = open_source(name, str(folder / f"{name}*.tar"), "image")
    finally:
        folder.chmod(0o755)
    sample = source.sample(0, 0, 16, 1)
    data, views = DataConfig(), Views(change=lambda pixels, rng: pixels)
    assert view_pixels(sample, source, data, views).shape == (1, 1, 3, 16, 16)
    assert len(source.digest) == len(Data(str(folder), None).fingerprint) == 64
    assert check_shard(source.manifest.path(0), None, make_cache(data), data)[0].samples == 1


def test_other_headers_do_not_hide_a_member(tmp_path: Path) -> None:
    content = pax({"comment": "made by git"}, b"g") + member("folder/", b"", b"5")
    content += pax({"mtime": "1.5", "size": "700"}) + header("a.jpg", octal(0)) + padded(b"a" * 700)
    content += (
        member("label", b"", b"V") + member("b.jpg", b"b", b"\0") + member("c.jpg", b"c", b"7")
    )
    signed = bytearray(header("é.jpg", octal(1)))
    signed[148:156] = f"{sum(signed[:148] + signed[156:]) + 256 - 512:06o}".encode() + b"\0 "
    content += bytes(signed) + padded(b"e")
    expected = {"a": b"a" * 700, "b": b"b", "c": b"c", "é": b"e"}
    assert samples(built(tmp_path, content)) == [(k, {"jpg": v}) for k, v in expected.items()]


def test_tars_joined_by_cat_are_read_to_the_end(tmp_path: Path) -> None:
    parts = [{"0.jpg": b"a", "0.txt": b"A"}, {"0.txt": b"B", "1.jpg": b"b"}, {"2.jpg": b"c"}]
    whole = b"".join(map(tar_of, parts))
    assert samples(built(tmp_path, whole)) == [
        ("0", {"jpg": b"a", "txt": b"A"}),
        ("0", {"txt": b"B"}),  # of another tar: not the caption of the first
        ("1", {"jpg": b"b"}),
        ("2", {"jpg": b"c"}),
    ]
    second = len(tar_of(parts[0]))
    damaged = whole[:second] + b"\xa5" + whole[second + 1 :]
    with pytest.raises(DataError, match=f"no header at byte {second:,}"):
        built(tmp_path, damaged)
    junk = tar_of(parts[0])[:-100] + b"\xa5" * 100  # as programs that do not clear their buffer
    assert len(built(tmp_path, junk)) == 1


def test_zeros_in_the_middle_are_not_the_end(tmp_path: Path) -> None:
    """A download that stopped leaves zeros where its pieces are missing."""
    files = {f"{n}.jpg": bytes([n + 1]) * 9000 for n in range(9)}
    content = bytearray(tar_of(files))
    content[20_000:40_000] = bytes(20_000)
    with pytest.raises(DataError, match="no header at byte"):
        built(tmp_path, bytes(content))


def test_files_sorted_by_kind_are_one_sample(tmp_path: Path) -> None:
    files = {f"{key}.{ending}": b"x" for ending in ("jpg", "json", "txt") for key in "abc"}
    found = samples(built(tmp_path, tar_of(files)))
    assert found == [(key, {"jpg": b"x", "json": b"x", "txt": b"x"}) for key in "abc"]


def test_names_that_differ_by_case(tmp_path: Path) -> None:
    keys = built(tmp_path, tar_of({"A.jpg": b"1", "a.jpg": b"2"}))
    assert samples(keys) == [("A", {"jpg": b"1"}), ("a", {"jpg": b"2"})]
    path = tmp_path / "0.tar"
    path.write_bytes(tar_of({"a.JPG": b"1", "a.jpg": b"2", "a.txt": b"3"}))
    assert samples(build_index(path)) == [("a", {"jpg": b"2", "txt": b"3"})]
    assert read_tar(path).left_out == {"file replaced by a later one of its name": ["a.jpg"]}


def test_links_are_the_files_that_they_lead_to(tmp_path: Path) -> None:
    content = header("d/early.jpg", octal(0), b"2", "../d/b.jpg")
    content += member("d/b.jpg", b"B") + member("t/one.txt", b"one")
    content += header("d/b.txt", octal(0), b"1", "t/one.txt")
    content += header("./d/c.jpg", octal(99), b"1", "d/b.jpg")  # its size has no meaning
    content += header("d/c.txt", octal(0), b"2", "./b.txt")  # a link to a link
    links = {"out": "/etc/passwd", "up": "../../x.jpg", "none": "no.jpg", "self": "self.jpg"}
    for name, target in links.items():
        content += header(f"{name}.jpg", octal(0), b"2", target)
    content += header("d/d.jpg", octal(0), b"1", "gone") + member("d/d.jpg", b"D") + END
    index = built(tmp_path, content)
    assert samples(index) == [
        ("d/early", {"jpg": b"B"}),
        ("d/b", {"jpg": b"B", "txt": b"one"}),
        ("t/one", {"txt": b"one"}),
        ("./d/c", {"jpg": b"B"}),
        ("d/c", {"txt": b"one"}),
        ("d/d", {"jpg": b"D"}),
    ]
    assert index.facts["left_out"] == {
        "file replaced by a later one of its name": [1, "d/d.jpg"],
        "link to no file of the tar": [4, "out.jpg"],
    }


SPARSE = {
    "gnu": header("s.jpg", octal(512), b"S") + bytes(512),
    "pax 0.1": pax({"GNU.sparse.map": "0,1", "GNU.sparse.size": "9" * 9}) + member("s.jpg", b"x"),
    "pax 1.0": pax({"GNU.sparse.major": "1", "GNU.sparse.name": "s.jpg"})
    + member("s.jpg", b"1\n0"),
    "star": pax({"SCHILY.realsize": "1000000"}) + member("s.jpg", b"x"),
}


@pytest.mark.parametrize("form", SPARSE)
def test_sparse_files_are_left_out_and_counted(tmp_path: Path, form: str) -> None:
    index = built(tmp_path, member("a.jpg", b"a") + SPARSE[form] + member("s.txt", b"t") + END)
    assert samples(index) == [("a", {"jpg": b"a"}), ("s", {"txt": b"t"})]
    assert index.facts["left_out"] == {"sparse file": [1, "s.jpg"]}


def test_a_map_of_several_blocks_is_skipped(tmp_path: Path) -> None:
    first = bytearray(header("s.jpg", octal(512), b"S"))
    first[482], first[148:156] = 1, b" " * 8
    first[148:156] = f"{sum(first):06o}".encode() + b"\0 "
    more = bytes(504) + b"\1" + bytes(7) + bytes(512)
    index = built(tmp_path, bytes(first) + more + bytes(512) + member("a.jpg", b"a"))
    assert samples(index) == [("a", {"jpg": b"a"})]


def test_files_of_systems_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"._a.jpg": b"m", "a.jpg": b"1", "._a.txt": b"m", "a.txt": b"2", "d/.DS_Store": b"m"}
    files |= {"__MACOSX/d/b.jpg": b"m", "d/@eaDir/b.jpg": b"m", "d/b.jpg": b"3", "Thumbs.db": b"m"}
    index = built(tmp_path, tar_of(files))
    assert samples(index) == [("a", {"jpg": b"1", "txt": b"2"}), ("d/b", {"jpg": b"3"})]
    assert index.facts["left_out"] == {"system or hidden file": [6, "._a.jpg"]}
    fifo = tmp_path / "1.tar"
    fifo.write_bytes(member("a.jpg", b"x") + header("pipe.jpg", octal(0), b"6") + END)
    assert index_shard(fifo).facts["left_out"] == {"special file": [1, "pipe.jpg"]}


def test_system_files_beside_shards_are_not_shards(tmp_path: Path) -> None:
    for name in ("0.tar", "sub/1.tar", "@eaDir/0.tar", "__MACOSX/1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, {"a.jpg": jpeg()})
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7")
    (tmp_path / "sub" / "._1.tar").write_bytes(b"\0\5\x16\7")
    url = f"file://{tmp_path}"
    for pattern in (str(tmp_path), f"{tmp_path}/*.tar", url, f"{url}/*0.tar"):
        assert [Path(path).name for path in find_shards(pattern)] == ["0.tar"]
    for pattern in (f"{tmp_path}/*/*.tar", f"{url}/*/*.tar"):
        assert [path.split("/")[-2:] for path in find_shards(pattern)] == [["sub", "1.tar"]]
    (tmp_path / "2.tar").mkdir()
    with pytest.raises(DataError, match=r"2\.tar is a folder, not a tar"):
        index_shard(tmp_path / "2.tar")
