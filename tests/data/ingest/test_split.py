"""`xray data split`: existing shards as a part to train on and a part that is held out."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from in_process import invoke
from shards import photo, write_tar

from data_pipelines.curation.curate import check_folder
from data_pipelines.ingest.split import SplitConfig, split
from data_pipelines.shards.source import open_source
from xray.errors import ConfigError, DataError

Members = dict[str, bytes]


def members(folder: Path) -> Members:
    """Read all members of a folder's tars with the standard library."""
    found: Members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and member.name not in found
                found[member.name] = file.read()
    return found


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards with 40 pictures, of which 8 are also there in another quality, and two texts."""
    root = tmp_path_factory.mktemp("pool")
    for shard in range(4):
        files = {}
        for number in range(shard * 10, shard * 10 + 10):
            facts = {"caption": f"picture {number}", "label": f"class {number % 2}"}
            files |= {
                f"{number:03d}.jpg": photo(number, (90, 70)),
                f"{number:03d}.json": json.dumps(facts, indent=3).encode(),
                f"{number:03d}.txt": f"picture {number}".encode(),
            }
            if number % 5 == 0:  # in another shard than the picture it resembles
                other = (number + 20) % 40
                files[f"{other:03d}b.jpg"] = photo(other, (90, 70), quality=50)
        if shard < 2:
            files[f"{shard}.txt"] = f"only a text {shard}".encode()
        write_tar(root / f"{shard}.tar", files)
    (root / "broken").mkdir()
    return root


def test_a_split_copies_every_sample_once(pool: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in pool.glob("*.tar")}
    report = split(str(pool), tmp_path, SplitConfig(val=0.2))
    trained, held = members(tmp_path), members(tmp_path / "val")
    assert not trained.keys() & held.keys() and trained | held == members(pool)
    assert {path: path.read_bytes() for path in pool.glob("*.tar")} == before

    def keys(found: Members) -> set[str]:
        return {name.split(".")[0] for name in found}

    assert (report.samples, report.held_out) == (len(keys(trained)), len(keys(held)))
    assert report.held_out in (9, 10, 11) and report.cut.groups == 8
    scenes = [{key.removesuffix("b") for key in keys(side)} for side in (trained, held)]
    assert not scenes[0] & scenes[1]


def test_workers_and_an_interruption_do_not_change_it(pool: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    split(str(pool), whole, SplitConfig(val=0.2))
    split(str(pool), part, SplitConfig(val=0.2, workers=1))
    kept = (part / "0.tar").stat().st_ino
    gone = [part / "2.tar", sorted((part / "val").glob("*.tar"))[0]]
    for path in gone:
        path.unlink()
    (part / ".packing.3.tar.77").write_bytes(b"half")
    report = split(str(pool), part, SplitConfig(val=0.2))
    assert (part / "0.tar").stat().st_ino == kept and not [*part.glob(".packing*")]
    assert report == split(str(pool), whole, SplitConfig(val=0.2))
    for tar in whole.rglob("*.tar"):
        assert (part / tar.relative_to(whole)).read_bytes() == tar.read_bytes()


def test_other_shards_are_not_overwritten(pool: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(str(pool), out, SplitConfig(val=0.2))
    with pytest.raises(ConfigError, match="another split"):
        split(str(pool), out, SplitConfig(val=0.1))
    with pytest.raises(ConfigError, match="has the shards to split"):
        split(str(pool), pool, SplitConfig())
    with pytest.raises(ConfigError, match="did not write"):
        split(str(out / "val"), pool, SplitConfig())
    with pytest.raises(ConfigError, match=r"val=0: use a share above 0 to 0.5"):
        split(str(pool), tmp_path / "b", SplitConfig(val=0))
    for name in ("x/a", "x_a"):
        write_tar(tmp_path / f"same/{name}.tar", {f"{name[-1]}.jpg": photo(1)})
    pattern = str(tmp_path / "same" / "{x/a,x_a}.tar")
    with pytest.raises(DataError, match=r"x/a.tar and x_a.tar would both be written to x_a.tar"):
        split(pattern, tmp_path / "d", SplitConfig())
    with pytest.raises(DataError, match="would both be written"):  # of a curation, too
        check_folder(tmp_path / "d", open_source("s", pattern, "image"))
    evil = tmp_path / "evil"
    evil.mkdir()
    with tarfile.open(evil / "0.tar", "w") as tar:
        (tmp_path / "x.txt").write_text("text")
        tar.add(tmp_path / "x.txt", "../x.txt")
    with pytest.raises(DataError):
        split(str(evil), tmp_path / "c", SplitConfig())


def test_the_command_says_what_it_wrote(pool: Path, tmp_path: Path) -> None:
    done = invoke("data", "split", str(pool), str(tmp_path), "val=0.2")
    assert done.exit_code == 0, done.stderr
    assert f"{tmp_path}/val: " in done.stdout and "near-duplicates in 8 groups" in done.stdout
    assert (tmp_path / "val" / ".xray" / "shards.manifest").is_file()
    wrong = invoke("data", "split", str(pool), "val=0.2")
    assert wrong.exit_code == 2 and "name the folder to write to before it" in wrong.stderr
    photos = invoke("data", "split", str(pool / "broken"), str(tmp_path / "d"))
    assert photos.exit_code == 2 and "neither .tar shards nor pictures" in photos.stderr
