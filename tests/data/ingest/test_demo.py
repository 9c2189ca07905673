"""Generated data are the same bytes wherever and whenever they are made."""

import dataclasses
import io
import json
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.ingest.demo import GROUNDS, SHAPES, DemoConfig, make_demo
from data_pipelines.shards.source import open_source
from xray.errors import ConfigError


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two", "three"):
        config = DemoConfig(photos=6, clips=24, heldout=6, per_shard=32, side=32, frames=8)
        make_demo(tmp_path / name, config)
        tars = sorted((tmp_path / name).rglob("*.tar"))
        made.append({str(tar.relative_to(tmp_path / name)): tar.read_bytes() for tar in tars})
    assert made[0] == made[1] == made[2] and len(made[0]) >= 4


def test_what_a_user_has_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "pictures" / "a.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    beside = tmp_path / "mine.tmp" / "b.txt"
    beside.parent.mkdir()
    beside.write_text("mine, too")
    config = DemoConfig(photos=6, clips=2, heldout=6, per_shard=32, side=32, frames=8)
    with pytest.raises(ConfigError, match="mine contains other files"):
        make_demo(tmp_path / "mine", config)
    assert mine.read_text() == "mine" and beside.read_text() == "mine, too"
    (tmp_path / "empty").mkdir()
    make_demo(tmp_path / "empty", config)
    make_demo(tmp_path / "empty", config)
    with pytest.raises(ConfigError, match="generated with photos=6, not 8"):
        make_demo(tmp_path / "empty", dataclasses.replace(config, photos=8))


def begin_together(root: Path, config: DemoConfig, barrier: Barrier) -> None:
    barrier.wait()
    make_demo(root, config)


def test_several_processes_may_make_one_folder(tmp_path: Path) -> None:
    config = DemoConfig(photos=6, clips=24, heldout=6, per_shard=32, side=32, frames=8)
    make_demo(tmp_path / "one", config)
    spawn = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "shared", config, spawn.Barrier(3))
    processes = [spawn.Process(target=begin_together, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    one, shared = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in files}
        for name in ("one", "shared")
        for files in [[path for path in (tmp_path / name).rglob("*") if path.is_file()]]
    )
    assert one == shared and len(one) > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "shared"]


def test_a_box_and_a_mask_hold_the_pixels_of_their_shape(tmp_path: Path) -> None:
    config = DemoConfig(photos=60, clips=2, heldout=6, side=64, frames=4, version=3)
    make_demo(tmp_path / "data", config)
    source = open_source("photos", str(tmp_path / "data" / "photos"), "image")
    for place in source.places():
        files = source.read(*place)
        meta = json.loads(files["json"])
        pixels = np.asarray(Image.open(io.BytesIO(files["jpg"])), np.float32)
        ground = np.array(GROUNDS[meta["caption"].split()[-2]])
        of_shape = np.abs(pixels - ground).max(axis=2) > 60
        mask = np.asarray(Image.open(io.BytesIO(files["mask.png"])))
        shape = next(word for word in meta["caption"].split() if word in SHAPES)
        assert set(np.unique(mask)) == {0, 1 + SHAPES.index(shape)}
        assert ((mask > 0) != of_shape).mean() < 0.05  # pixels of the outline
        rows, columns = of_shape.nonzero()
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(64 * np.array(meta["object_box"]) - found).max() <= 3, meta["caption"]


def test_version_2_adds_a_box_and_older_folders_stay_valid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = DemoConfig(photos=6, clips=2, heldout=6, side=32, frames=4)
    make_demo(tmp_path / "plain", plain)
    make_demo(tmp_path / "boxed", dataclasses.replace(plain, version=2))
    without, boxed = (
        open_source("photos", str(tmp_path / name / "photos"), "image")
        for name in ("plain", "boxed")
    )
    for place in without.places():
        old, new = without.read(*place), boxed.read(*place)
        meta = json.loads(new["json"])
        assert len(meta.pop("object_box")) == 4
        assert meta == json.loads(old["json"]) and new["jpg"] == old["jpg"]
        assert new.keys() == old.keys()
    known = tmp_path / "plain" / "demo.json"
    record = json.loads(known.read_text())
    del record["config"]["version"]  # as an older version wrote it
    known.write_text(json.dumps(record))
    make_demo(tmp_path / "plain", plain)
    assert "boxes" not in caplog.text
    with caplog.at_level("INFO", "xray"):
        make_demo(tmp_path / "plain", dataclasses.replace(plain, version=2))
    assert "plain has no boxes of shapes: delete it" in caplog.text
    assert json.loads(known.read_text()) == record
