"""`data check` and `data stats` on shards made here, whole and broken on purpose."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from in_process import invoke
from shards import jpeg, photo, write_tar

from data_pipelines.checks.check import CheckReport, check
from data_pipelines.checks.check_shard import ShardCheck
from data_pipelines.shards.manifest import write_manifest
from data_pipelines.shards.source import make_cache
from xray.config import DataConfig

ROOT = Path(__file__).resolve().parents[3]
CAPTION = {"caption": "a red <b>square</b> & more", "language": "en", "hashtags": ["#Red", "#$x$"]}
META = json.dumps(CAPTION).encode()


def checked(pattern: Path | str, folder: Path, workers: int = 1) -> CheckReport:
    config = DataConfig(cache=str(folder / "cache"))
    return check(str(pattern), make_cache(config), config, workers)


def only(report: CheckReport) -> ShardCheck:
    assert len(report.shards) == 1
    return report.shards[0]


def good(path: Path, count: int = 3, seed: int = 0) -> Path:
    files: dict[str, bytes] = {}
    for number in range(count):
        size = (60 + 10 * number, 40)
        files |= {f"{number:03d}.jpg": photo(seed + number, size), f"{number:03d}.json": META}
    return write_tar(path, files)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder of one whole shard, one of bad samples and tars that cannot be read."""
    folder = tmp_path / "shards"
    folder.mkdir()
    good(folder / "0_good.tar")
    files = {
        "cut.jpg": photo(1)[:-400],
        "cut.json": META,
        "junk.mp4": bytes(range(256)) * 8,
        "junk.txt": b"a clip",
        "json.jpg": jpeg(),
        "json.json": b"{",
        "silent.jpg": jpeg(),
        "nothing.txt": b"words alone",
        "two.jpg": jpeg(),
        "two.png": jpeg(),
        "two.txt": b"which one",
        "twice.jpg": jpeg(),
        "twice.txt": b"first",
        "last.jpg": jpeg(),
        "last.txt": b"in between",
    }
    bad = write_tar(folder / "1_bad.tar", files)
    again = write_tar(tmp_path / "again.tar", {"twice.jpg": jpeg(), "twice.txt": b"second"})
    append(bad, again)
    whole = good(tmp_path / "whole.tar").read_bytes()
    (folder / "2_cut.tar").write_bytes(whole[:3000])
    (folder / "3_empty.tar").write_bytes(b"")
    (folder / "4_text.tar").write_bytes(b"not a tar at all " * 100)
    good(folder / "5_good.tar", seed=9)
    return folder


def append(target: Path, source: Path) -> None:
    with tarfile.open(source) as more, tarfile.open(target, "a") as archive:
        for member in more:
            archive.addfile(member, more.extractfile(member))


def test_whole_shards_are_counted(tmp_path: Path) -> None:
    shard = only(checked(good(tmp_path / "a.tar"), tmp_path))
    assert (shard.samples, shard.error, shard.causes) == (3, "", {})
    assert (shard.images.samples, shard.images.usable, shard.images.captioned) == (3, 3, 3)
    assert shard.clips.samples == 0
    assert (shard.width.least, shard.width.mean, shard.width.most) == (60, 70, 80)
    assert (shard.height.least, shard.height.most) == (40, 40)
    assert shard.bytes == (tmp_path / "a.tar").stat().st_size
    assert shard.matches_index is None and shard.matches_sha256 is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"], "check wrote beside it"


def test_each_fault_is_named(broken: Path, tmp_path: Path) -> None:
    report = checked(broken, tmp_path)
    assert report.broken
    shards = {Path(shard.path).name: shard for shard in report.shards}
    found = {bad.key: bad.cause for bad in shards["1_bad.tar"].bad}
    assert found == {
        "cut": "undecodable image",
        "junk": "undecodable video",
        "json": "broken json",
        "nothing": "no media",
        "two": "no media",
        "twice": "duplicate key",
    }
    bad = shards["1_bad.tar"]
    assert bad.causes["no media"] == 2 and bad.duplicates == 1
    assert "jpg, png" in next(b.detail for b in bad.bad if b.key == "two")
    assert (bad.without_caption, bad.first_without_caption) == (1, "silent")
    assert (bad.images.samples, bad.images.usable, bad.images.captioned) == (7, 5, 3)
    assert (bad.clips.samples, bad.clips.usable) == (1, 0)
    assert "truncated" in shards["2_cut.tar"].error
    assert "empty" in shards["3_empty.tar"].error
    assert "not a tar" in shards["4_text.tar"].error
    for name in ("0_good.tar", "5_good.tar"):
        assert shards[name].images.usable == 3 and not shards[name].error, name
    assert [Path(shard.path).name[0] for shard in report.shards] == list("012345")


def test_a_sample_written_twice_in_a_row(tmp_path: Path) -> None:
    tar = good(tmp_path / "a.tar", 1)
    append(tar, good(tmp_path / "b.tar", 1, seed=5))  # the index keeps one sample of both
    shard = only(checked(tar, tmp_path))
    assert [(bad.key, bad.cause, bad.detail) for bad in shard.bad] == [
        ("000", "duplicate key", "2 times")
    ]


@pytest.mark.parametrize("pattern", ["shards", "shards/*.tar", "shards/{0..1}.tar"])
def test_a_tar_changed_after_indexing(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    good(folder / "0.tar")
    changed = good(folder / "1.tar")
    write_manifest(str(folder), checksum=True)
    before = checked(tmp_path / pattern, tmp_path)
    assert not before.broken
    assert [shard.matches_sha256 for shard in before.shards] == [True, True]
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1  # in the padding: all samples are still the same
    changed.write_bytes(bytes(content))
    same, other = checked(tmp_path / pattern, tmp_path).shards
    assert (same.matches_sha256, same.error) == (True, "")
    assert (other.matches_index, other.matches_sha256) == (True, False)
    assert "sha256" in other.error and "1.tar" in other.error and other.images.usable == 3


def test_a_tar_replaced_after_indexing(tmp_path: Path) -> None:
    tar = good(tmp_path / "a.tar")
    write_manifest(str(tmp_path))
    good(tar, count=4)
    for _ in range(2):  # to look must not make it look right
        shard = only(checked(tmp_path, tmp_path))
        assert shard.matches_index is False and "changed since it was indexed" in shard.error
        assert shard.samples == 4


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_manifest_alone_tells_of_a_change(tmp_path: Path, scheme: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    tar = good(folder / "a.tar")
    write_manifest(str(folder), checksum=True)
    (folder / ".xray" / "a.tar.index").unlink()
    assert only(checked(f"{scheme}{folder}", tmp_path / "before")).matches_sha256 is True
    good(tar, count=4)
    shard = only(checked(f"{scheme}{folder}", tmp_path / "after"))
    assert (shard.matches_index, shard.matches_sha256) == (False, False)


def test_remote_shards(broken: Path, tmp_path: Path) -> None:
    write_manifest(str(broken / "0_good.tar"), checksum=True)
    report = checked(f"file://{broken}", tmp_path)
    assert [bool(shard.error) for shard in report.shards] == [False, False, True, True, True, False]
    assert report.shards[0].matches_sha256 is True
    assert report.shards[2].error.startswith(f"shard file://{broken}/2_cut.tar")


def test_workers_do_not_change_the_report(broken: Path, tmp_path: Path) -> None:
    assert checked(broken, tmp_path, 1) == checked(broken, tmp_path, 2)


def film(frames: int = 12) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            pixels = np.full((48, 64, 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_clips_and_statistics(tmp_path: Path) -> None:
    clip, late = film(), film(60)
    late = late[: len(late) // 2] + bytes(len(late) - len(late) // 2)  # no index of its frames
    files = {"a.mp4": clip, "a.json": META, "b.mp4": clip, "b.jpg": jpeg(), "c.mp4": late}
    report = checked(write_tar(tmp_path / "a.tar", files), tmp_path)
    shard = only(report)
    assert (shard.clips.samples, shard.clips.usable, shard.clips.captioned) == (3, 2, 1)
    assert (shard.images.samples, shard.images.usable) == (1, 1)
    assert {bad.key: bad.cause for bad in shard.bad} == {"c": "undecodable video"}
    assert shard.seconds == pytest.approx(2.4)
    stats = report.stats
    assert stats.numbers["frames"] == {12: 2} and stats.numbers["seconds"] == {1.2: 2}
    assert stats.numbers["width"] == {64: 2, 40: 1} and stats.numbers["words"] == {5: 1}
    assert stats.names["extension"] == {"mp4": 2, "jpg": 1}
    assert stats.names["language"] == {"en": 1} and stats.names["hashtag"] == {"red": 1, "$x$": 1}
    assert sorted(picture.key for picture in stats.sheet) == ["a", "b", "b"]


def test_the_command_lists_findings_and_ends_with_1(broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = invoke("data", "check", str(broken), "--json", str(out))
    assert done.exit_code == 1, done.output
    assert f"{broken}/1_bad.tar, cut, undecodable image: " in done.output
    assert f"shard {broken}/3_empty.tar is empty" in done.output
    assert "6 shards; 15 samples; " in done.output, done.output
    assert "11 of 13 images usable, 9 captioned; 0 of 1 clips usable" in done.output
    heads = done.output.partition("6 shards")[0]
    assert "images" in heads and "clips" in heads
    found = json.loads(out.read_text())
    assert found["shards"][1]["causes"]["broken json"] == 1
    assert found["stats"]["names"]["hashtag"]["red"] == 7 and "sheet" not in found["stats"]


def test_the_command_on_whole_shards_ends_with_0(tmp_path: Path) -> None:
    tars = [str(good(tmp_path / name)) for name in ("a.tar", "b.tar")]
    done = invoke("data", "check", *tars)
    assert done.exit_code == 0, done.output
    assert "2 shards; 6 samples; 6 of 6 images usable, 6 captioned: no errors" in done.output
    heads = " ".join(line for line in done.output.splitlines() if line.startswith("┃"))
    assert "images" in heads and "clips" not in heads and "no text" not in heads  # there are none
    missing = invoke("data", "check", str(tmp_path / "none"))
    assert missing.exit_code == 2 and len(missing.stderr.strip().splitlines()) == 1


def test_only_twenty_bad_samples_are_listed(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{n:02d}.jpg": b"junk" for n in range(23)})
    done = invoke("data", "check", str(tar))
    assert done.output.count("undecodable image: ") == 20
    assert "and 3 more" in done.output and "23 undecodable image\n" in done.output


def test_statistics_page(tmp_path: Path) -> None:
    tar, out = good(tmp_path / "a.tar"), tmp_path / "new" / "stats.html"
    done = invoke("data", "stats", str(tar), "--out", str(out))
    assert done.exit_code == 0, done.output
    page = out.read_text()
    for title in ("Sizes", "Captions", "Tags", "Languages", "Files", "Samples"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/png;base64,") == 3
    assert page.count("data:image/svg+xml;base64,") == 3 + 2 and page.count("class=bars") == 3
    assert "a red &lt;b&gt;square&lt;/b&gt; &amp; more" in page and "<b>" not in page
    assert "http" not in page, "not self-contained"


@pytest.mark.parametrize("name", ["captions_val/00000.tar", "actions_val/00000.tar"])
def test_real_shards_are_whole(shared_data: Path, tmp_path: Path, name: str) -> None:
    report = checked(shared_data / name, tmp_path)
    shard = only(report)
    assert not report.broken, shard
    usable = shard.images if name.startswith("captions") else shard.clips
    assert usable.captioned == shard.samples > 50


def test_workers_do_not_import_torch() -> None:
    code = "import sys, data_pipelines.checks.check; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
