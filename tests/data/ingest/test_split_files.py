"""Split files of HMDB51 and UCF101, against torchvision's reading of them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import HMDB51, UCF101

from data_pipelines.ingest.labelled import open_labelled
from data_pipelines.ingest.split_files import open_splits
from data_pipelines.shards.source import Source
from xray.errors import DataError
from xray.evaluation.feature_extraction import labels_of

HMDB_CLASSES = ("brush_hair", "cartwheel", "wave")
UCF_CLASSES = ("ApplyEyeMakeup", "Archery", "YoYo")
EACH = 9


def clips(root: Path, classes: tuple[str, ...], name: str) -> Path:
    """Write empty files: clips are listed here, not decoded."""
    for label in classes:
        (root / label).mkdir(parents=True)
        for number in range(EACH):
            (root / label / f"{name.format(label, number)}.avi").write_bytes(b"clip")
    return root


@pytest.fixture
def hmdb(tmp_path: Path) -> tuple[Path, Path]:
    """Class folders with odd names, and the files of three splits."""
    folder, splits = clips(tmp_path / "hmdb", HMDB_CLASSES, "A_{0}_u;#!_{1}"), tmp_path / "splits"
    splits.mkdir()
    rng = np.random.default_rng(0)
    for split in (1, 2, 3):
        for label in HMDB_CLASSES:
            uses = rng.permutation([1, 1, 1, 1, 2, 2, 2, 0, 0])
            lines = [f"A_{label}_u;#!_{n}.avi {use} \n" for n, use in enumerate(uses)]
            (splits / f"{label}_test_split{split}.txt").write_text("".join(lines))
    return folder, splits


@pytest.fixture
def ucf(tmp_path: Path) -> tuple[Path, Path]:
    folder, splits = clips(tmp_path / "ucf", UCF_CLASSES, "v_{0}_g{1:02d}_c01"), tmp_path / "lists"
    splits.mkdir()
    numbers = "".join(f"{n} {label}\r\n" for n, label in enumerate(UCF_CLASSES, start=1))
    (splits / "classInd.txt").write_text(numbers)
    for split in (1, 2, 3):
        train, test = [], []
        for n, label in enumerate(UCF_CLASSES, start=1):
            for number in range(EACH):
                name = f"{label}/v_{label}_g{number:02d}_c01.avi"
                tested = number % 3 == split - 1
                (test if tested else train).append(name if tested else f"{name} {n}")
        (splits / f"trainlist0{split}.txt").write_text("\n".join(train) + "\n")
        (splits / f"testlist0{split}.txt").write_text("\n".join(test) + "\n")
    return folder, splits


def paths(source: Any) -> list[str]:
    return [str(source.items[member].path) for _, member in source.places()]


def opened(folder: Path, splits: Path) -> tuple[Source, dict[int, tuple[Source, Source]]]:
    source = open_labelled("eval.knn.train", str(folder), "video")
    return open_splits("eval.knn.splits", source, str(splits))


def test_the_splits_of_hmdb51_are_torchvisions(hmdb: tuple[Path, Path]) -> None:
    folder, splits = hmdb
    whole, pairs = opened(folder, splits)
    assert list(pairs) == [1, 2, 3] and whole.classes == ("brush hair", "cartwheel", "wave")
    listed = sorted(map(str, folder.glob("*/*.avi")))
    judge: Any = SimpleNamespace(TRAIN_TAG=HMDB51.TRAIN_TAG, TEST_TAG=HMDB51.TEST_TAG)
    for split, pair in pairs.items():
        for source, train in zip(pair, (True, False), strict=True):
            theirs = HMDB51._select_fold(judge, listed, str(splits), split, train)
            assert paths(source) == [listed[number] for number in theirs]
            assert len(source) == (12 if train else 9)
            owners = [HMDB_CLASSES.index(Path(path).parent.name) for path in paths(source)]
            assert labels_of(source).tolist() == owners


def test_the_splits_of_ucf101_are_torchvisions(ucf: tuple[Path, Path]) -> None:
    folder, splits = ucf
    for path in (folder / "YoYo").iterdir():  # encoded again
        path.rename(path.with_suffix(".mp4"))
    whole, pairs = opened(folder, splits)
    assert whole.classes == ("Apply Eye Makeup", "Archery", "Yo Yo") and list(pairs) == [1, 2, 3]
    listed = sorted(str(path.with_suffix(".avi")) for path in folder.glob("*/*"))
    judge: Any = SimpleNamespace(root=str(folder))
    for split, pair in pairs.items():
        for source, train in zip(pair, (True, False), strict=True):
            theirs = UCF101._select_fold(judge, listed, str(splits), split, train)
            mine = [str(Path(path).with_suffix(".avi")) for path in paths(source)]
            assert mine == [listed[number] for number in theirs]
    assert labels_of(pairs[1][1]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_missing_clips_are_counted_and_named(
    hmdb: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder, splits = hmdb
    before = {split: list(map(len, pair)) for split, pair in opened(folder, splits)[1].items()}
    (folder / "wave" / "mine.avi").write_bytes(b"in no list")
    uses = {
        split: [
            line.split()[1]
            for line in (splits / f"wave_test_split{split}.txt").read_text().splitlines()
        ]
        for split in (1, 2, 3)
    }
    for number in (0, 4):
        (folder / "wave" / f"A_wave_u;#!_{number}.avi").unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        _, pairs = opened(folder, splits)
    for split, (train, test) in pairs.items():
        gone = [uses[split][number] for number in (0, 4)]
        assert len(train) == before[split][0] - gone.count("1")
        assert len(test) == before[split][1] - gone.count("2")
    lines = [record.getMessage() for record in caplog.records]
    missing = [line for line in lines if "are missing" in line]
    assert missing == [
        "eval.knn.splits: 2 of 27 listed clips are missing and left out: wave/A_wave_u;#!_0, "
        "wave/A_wave_u;#!_4"
    ]
    assert f"eval.knn.splits: 1 clip of {folder} in no split" in lines


def test_split_files_with_mistakes_are_one_line(
    hmdb: tuple[Path, Path], ucf: tuple[Path, Path], tmp_path: Path
) -> None:
    def refused(folder: Path, splits: Path) -> str:
        with pytest.raises(DataError) as raised:
            opened(folder, splits)
        text = str(raised.value)
        assert "\n" not in text and text.startswith("eval.knn.splits")
        return text

    folder, splits = hmdb
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no split files: neither CLASS_test_split1.txt" in refused(folder, empty)
    assert "cannot be read: No such file" in refused(folder, tmp_path / "gone")
    other = splits / "climb_test_split2.txt"
    other.write_text("gone.avi 1\nthere.avi 2\n")
    assert f"split 2: climb_test_split2.txt names no clip of {folder}" in refused(folder, splits)
    other.write_text("gone.avi 1\nthere.avi 3\n")
    assert "climb_test_split2.txt line 2: expected the name of a clip" in refused(folder, splits)
    other.unlink()
    for label in HMDB_CLASSES:
        path = splits / f"{label}_test_split3.txt"
        path.write_text(path.read_text().replace(" 2 ", " 0 "))
    assert "split 3 has no test clips" in refused(folder, splits)
    folder, splits = ucf
    lines = (splits / "trainlist02.txt").read_text()
    with (splits / "testlist02.txt").open("a") as file:
        file.write(lines.split(" ")[0])
    assert "trainlist02.txt lists ApplyEyeMakeup/v_ApplyEyeMakeup_g00" in refused(folder, splits)
    (splits / "trainlist01.txt").write_text("v_YoYo_g01_c01.avi 3\n")
    assert "trainlist01.txt line 1: expected CLASS/NAME.avi" in refused(folder, splits)
