"""Rows of `data check` for tars, indexes and manifests that are not as they should be."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from in_process import invoke
from shards import jpeg, photo, write_tar
from tars import END, header, member, octal, pax, tar_of

from data_pipelines.checks.check import CheckReport, check
from data_pipelines.shards import tar_index
from data_pipelines.shards.columns import open_columns, save_columns
from data_pipelines.shards.manifest import write_manifest
from data_pipelines.shards.source import make_cache
from xray.config import DataConfig


def checked(pattern: Path | str, folder: Path) -> CheckReport:
    config = DataConfig(cache=str(folder / "cache"))
    return check(str(pattern), make_cache(config), config, 1)


def found(report: CheckReport) -> list[list[tuple[str, str]]]:
    return [[(bad.key, bad.cause) for bad in shard.bad] for shard in report.shards]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    return folder


def test_a_hostile_tar_is_a_row_beside_whole_ones(shards: Path, tmp_path: Path) -> None:
    write_tar(shards / "0.tar", {"a.jpg": photo(1), "a.txt": b"words"})
    (shards / "1.tar").write_bytes(pax({"size": "-512"}) + member("b.jpg", b"x") + END)
    write_tar(shards / "3.tar", {"a.jpg": photo(1), "a.txt": b"words"})
    report = checked(shards, tmp_path)
    assert ["damaged" in shard.error for shard in report.shards] == [False, True, False]
    assert [shard.images.usable for shard in report.shards] == [1, 0, 1]
    done = invoke("data", "check", shards)
    assert done.exit_code == 1 and f"shard {shards}/1.tar is truncated, damaged" in done.output


def test_members_without_a_sample_are_rows(shards: Path, tmp_path: Path) -> None:
    content = member("a.jpg", jpeg()) + member("a.txt", b"words")
    content += header("s.txt", octal(512), b"S") + bytes(512) + header("p.jpg", octal(0), b"6")
    content += header("l.jpg", octal(0), b"2", "/etc/passwd") + member("a.JPG", jpeg())
    content += member("._a.jpg", b"m") + member("@eaDir/a.jpg", b"m") + END
    (shards / "0.tar").write_bytes(content)
    report = checked(shards, tmp_path)
    assert found(report) == [
        [
            ("s.txt", "sparse file"),
            ("p.jpg", "special file"),
            ("l.jpg", "link to no file of the tar"),
            ("a", "duplicate key"),
        ]
    ]
    assert report.shards[0].system_files == 2 and report.shards[0].images.usable == 2
    done = invoke("data", "check", shards)
    assert "2 system or hidden files left out" in done.output
    assert "s.txt, sparse file: pack it again without the option --sparse of tar" in done.output


def test_files_of_systems_alone_are_no_damage(shards: Path, tmp_path: Path) -> None:
    files = {"._a.jpg": b"m", "a.jpg": jpeg(), "._a.txt": b"m", "a.txt": b"words"}
    write_tar(shards / "0.tar", files)
    (shards / "._0.tar").write_bytes(b"\0\5\x16\7")
    report = checked(shards, tmp_path)
    assert not report.broken and len(report.shards) == 1
    assert report.shards[0].images.captioned == 1


def test_both_halves_of_a_joined_tar_are_counted(shards: Path, tmp_path: Path) -> None:
    halves = [{f"{n}.jpg": jpeg(), f"{n}.txt": b"words"} for n in range(2)]
    (shards / "0.tar").write_bytes(b"".join(map(tar_of, halves)))
    report = checked(shards, tmp_path)
    assert not report.broken and report.shards[0].images.captioned == 2


def test_a_file_above_the_limit_is_one_bad_sample(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipelines.checks.check_shard import check_shard

    monkeypatch.setattr(tar_index, "LARGEST", 2000)
    tar = write_tar(shards / "0.tar", {"a.jpg": bytes(2001), "b.jpg": jpeg()})
    config = DataConfig(cache=str(tmp_path / "cache"))
    row, _ = check_shard(str(tar), None, make_cache(config), config)
    assert [(bad.key, bad.cause) for bad in row.bad] == [("a", "file too large")]
    assert not row.error and row.images.usable == 1


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_damaged_index_is_a_row(shards: Path, tmp_path: Path, scheme: str) -> None:
    for name in ("0.tar", "1.tar", "2.tar"):
        write_tar(shards / name, {"a.jpg": jpeg(), "a.json": b'{"caption": "words"}'})
    write_manifest(str(shards))
    cut, moved = shards / ".xray" / "0.tar.index", shards / ".xray" / "1.tar.index"
    cut.write_bytes(cut.read_bytes()[:-1] + b"\xa5")
    table, facts = open_columns(moved)
    save_columns(
        moved, table | {"offsets": np.flip(table["offsets"], 1)}, facts
    )  # with its checksum
    report = checked(f"{scheme}{shards}", tmp_path)
    first, second, third = report.shards
    assert first.matches_index is second.matches_index is False and third.matches_index is True
    assert "0.tar.index is damaged" in first.error or ".index is damaged" in first.error
    assert "is damaged: the samples are at other places in the tar" in second.error
    assert "delete it and run xray data index" in first.error and not third.error
    assert all(shard.images.captioned == 1 for shard in report.shards)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_damaged_manifest_is_a_row(shards: Path, tmp_path: Path, scheme: str) -> None:
    write_tar(shards / "0.tar", {"a.jpg": jpeg(), "a.txt": b"words"})
    write_manifest(str(shards))
    path = shards / ".xray" / "shards.manifest"
    path.write_bytes(path.read_bytes()[:-1] + b"\xa5")
    report = checked(f"{scheme}{shards}", tmp_path)
    assert not report.shards[0].error and report.broken
    shown = f"{scheme}{shards}/shards.manifest" if scheme else path
    expected = f"manifest {shown} is damaged: its content does not have its checksum: "
    assert report.shards[1].error == f"{expected}delete it and run xray data index"
    path.unlink()
    assert not checked(f"{scheme}{shards}", tmp_path).broken


def test_compressed_tars_are_named_as_such(shards: Path, tmp_path: Path) -> None:
    import gzip

    tar = write_tar(tmp_path / "0.tar", {"a.jpg": jpeg()})
    packed = gzip.compress(tar.read_bytes())
    for name in ("0.tar.gz", "1.tar"):  # the second by its content alone
        (shards / name).write_bytes(packed)
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(shards / "0.tar.gz", only)
    for pattern in (shards / "0.tar.gz", shards / "{0..0}.tar.gz", shards / "*.tar.gz", only):
        done = invoke("data", "check", pattern)
        assert done.exit_code == 2 and ".tar.gz is compressed" in done.stderr, done.output
        assert "damaged" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    done = invoke("data", "check", shards)
    assert f"{shards}: 1 compressed tars are not read (first 0.tar.gz)" in done.stderr
    assert f"shard {shards}/1.tar is compressed with gzip: " in done.stdout
    assert "unpack it with gunzip to a .tar" in done.stdout
