"""Kinetics' csv and MSR-VTT's json and csv, over folders of clips; nothing is decoded here."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from clips import clip

from data_pipelines.ingest.labelled import open_labelled
from data_pipelines.ingest.pack import PackConfig, pack
from data_pipelines.ingest.table_columns import TableKeys
from data_pipelines.ingest.user_data import list_files
from xray.errors import DataError
from xray.evaluation.feature_extraction import labels_of, read_all_captions

KINETICS = ("label", "youtube_id", "time_start", "time_end", "split")


def written(path: Path, rows: list[tuple[object, ...]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"clip")
    return path


def names(source: Any) -> list[str]:
    return [item.path.name for item in source.items]


@pytest.mark.parametrize("layout", ["flat", "classes", "annotations"])
def test_the_csv_of_kinetics(tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str) -> None:
    rows = [
        ("air drumming", "-3B32lodo2M", 59, 69, "val"),
        ("abseiling", "0347ZoDXyP0", 95, 105, "val"),
        ("abseiling", "gone", 0, 10, "val"),
        ("waiting in line", "_abc", 1000, 1010, "val"),
    ]
    table = "annotations/val.csv" if layout == "annotations" else "val.csv"
    path = written(tmp_path / "k400" / table, [KINETICS, *rows])
    folder = tmp_path / "k400" / "val"
    ids = {"-3B32lodo2M_000059_000069.mp4": "air_drumming"}
    ids |= {"0347ZoDXyP0_000095_000105.mp4": "abseiling", "_abc_001000_001010.webm": "waiting"}
    for name, label in ids.items():
        touched(folder / label / name if layout == "classes" else folder / name)
    touched(folder / "0347ZoDXyP0_000000_000010.mp4")  # of another list
    source = open_labelled("eval.knn.test", str(path), "video")
    assert names(source) == list(ids)
    assert source.classes == ("abseiling", "air drumming", "waiting in line")
    assert labels_of(source).tolist() == [1, 0, 2]
    assert (
        f"eval.knn.test={path}: 1 of 4 listed clips are missing and left out: "
        in caplog.text.replace("\n", " ")
    )
    assert "gone_000000_000010.mp4" in caplog.text


VIDEOS = [
    {"video_id": f"video{n}", "id": n, "split": split, "url": f"https://tube/{n}", "category": n}
    for n, split in enumerate(["train", "validate", "test", "test", "test"])
]
SENTENCES = [
    {"video_id": f"video{n}", "sen_id": 2 * n + i, "caption": f"caption {i} of {n}"}
    for i in range(2)
    for n in range(5)
]


def test_the_json_of_msrvtt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "MSRVTT_data.json"
    path.write_text(json.dumps({"info": {}, "videos": VIDEOS, "sentences": SENTENCES}))
    film = clip(32, 4)
    for number in (0, 2, 4):
        touched(tmp_path / "videos" / "all" / f"video{number}.mp4").write_bytes(film)
    with caplog.at_level(logging.INFO):
        source = open_labelled("eval.video_retrieval", str(path), "video")
    assert names(source) == ["video2.mp4", "video4.mp4"]
    assert read_all_captions(source) == [[f"caption {i} of {n}" for i in range(2)] for n in (2, 4)]
    assert "those of the split test are used, 3 of 5 clips" in caplog.text
    assert "1 of 3 listed clips are missing and left out: video3.mp4" in caplog.text
    path.write_text(json.dumps({"videos": VIDEOS[2:], "sentences": SENTENCES}))
    assert len(open_labelled("test only", str(path), "video")) == 2
    pack(path, tmp_path / "packed", PackConfig())
    packed = open_labelled("packed", str(tmp_path / "packed"), "video")
    assert read_all_captions(packed) == read_all_captions(source)
    (line,) = (tmp_path / "packed" / "pack_skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "video3.mp4"


def test_the_csv_of_msrvtt_1k(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[tuple[object, ...]] = [
        (f"ret{n}", f"msr97{n}", f"video97{n}", f"a man, number {n}") for n in range(4)
    ]
    columns = ("key", "vid_key", "video_id", "sentence")
    path = written(tmp_path / "MSRVTT_JSFUSION_test.csv", [columns, *rows])
    for number in range(4):
        touched(tmp_path / "TestVideo" / f"video97{number}.avi")
    source = open_labelled("eval.video_retrieval", str(path), "video")
    assert read_all_captions(source) == [[f"a man, number {n}"] for n in range(4)]
    assert names(source) == [f"video97{n}.avi" for n in range(4)] and "missing" not in caplog.text

    items = list_files(str(path), keys=TableKeys(caption_key="sentence"))
    assert [item.describe()[0] for item in items] == read_all_captions(source)


def test_a_table_with_a_column_of_files_is_no_list_of_clips(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns: dict[str, list[object]] = {"video_id": ["v1", "v2"], "caption": ["one", "two"]}
    for stem in ("v1", "v2"):
        touched(tmp_path / f"{stem}.mp4")  # which a list of ids would find
    rows = [("video_id", "clip", "caption"), ("v1", "a.mp4", "one"), ("v2", "b.mp4", "two")]
    path = written(tmp_path / "a.csv", [*rows])
    assert [item.name for item in list_files(str(path))] == ["a.mp4", "b.mp4"]
    held = {"clip": [{"bytes": b"clip", "path": name} for name in ("a.mp4", "b.mp4")]}
    parquet.write_table(pyarrow.table({**columns, **held}), tmp_path / "b.parquet")
    items = list_files(str(tmp_path / "b.parquet"))
    assert [(item.column, item.read()) for item in items] == [("clip", b"clip")] * 2


def test_lists_with_mistakes_are_one_line(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(DataError) as raised:
            open_labelled("eval.knn.test", str(path), "video")
        assert "\n" not in str(raised.value)
        return str(raised.value)

    path = written(tmp_path / "val.csv", [KINETICS, ("a", "b", 1, 11, "val")])
    assert "none of its 1 clip is in" in refused(path) and "b_000001_000011.mp4" in refused(path)
    written(path, [KINETICS, ("a", "b", 1, 11, "val"), ("a", "c", "soon", 11, "val")])
    assert "data row 2: time_start and time_end must be numbers" in refused(path)
    written(path, [KINETICS, ("a", "", 1, 11, "val")])
    assert "data row 1: it names no clip" in refused(path)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"videos": [{"id": 3}], "sentences": SENTENCES}))
    assert "an entry of videos has no video_id" in refused(broken)
    broken.write_text(json.dumps({"videos": VIDEOS, "sentences": [{"video_id": "video1"}]}))
    assert "none or no caption" in refused(broken)
    touched(tmp_path / "video0.mp4")
    broken.write_text(json.dumps({"videos": VIDEOS, "sentences": SENTENCES}))
    assert "none of the 3 listed clips is there" in refused(broken)  # only one of split train
