"""Image folders and CSV files as evaluation sets, against torchvision and against shards."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from shards import photo, write_tar
from torchvision.datasets import ImageFolder

from data_pipelines.ingest.labelled import open_labelled
from data_pipelines.ingest.pack import PackConfig, pack
from data_pipelines.ingest.plain_files import FileSource
from data_pipelines.shards.source import Source
from data_pipelines.tags import labels as tag_labels
from data_pipelines.tags.reader import TagRules
from data_pipelines.tags.vocabulary import Vocabulary
from xray.config import DataConfig
from xray.errors import DataError
from xray.evaluation.class_labels import Classes, numbers_of, renumber
from xray.evaluation.feature_extraction import extract, labels_of, read_all_captions

CLASSES = ("zebra", "ant", "sea_horse")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """FOLDER/class/*.jpg, one picture deeper, and files that are none."""
    root = tmp_path / "set"
    for number, name in enumerate(CLASSES):
        (root / name / "more").mkdir(parents=True)
        for i in range(4):
            where = root / name / ("more" if i == 3 else "")
            (where / f"{name}{i}.jpg").write_bytes(photo(10 * number + i))
        (root / name / "notes.txt").write_text("no picture")
    return root


def test_an_image_folder_is_torchvisions(folder: Path) -> None:
    source, theirs = open_labelled("set", str(folder), "image"), ImageFolder(folder)
    assert list(source.classes) == [name.replace("_", " ") for name in theirs.classes]
    assert len(source) == len(theirs) == 12
    paths = {path: label for path, label in theirs.samples}
    assert isinstance(source, FileSource)
    labels = labels_of(source).tolist()
    mine = {str(item.path): label for item, label in zip(source.items, labels, strict=True)}
    assert mine == paths
    key = source.index(0).key(0)
    assert key == "ant/ant0" and source.read(0, 0)["jpg"] == (folder / f"{key}.jpg").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_pictures_in_shards_give_the_same_rows(folder: Path, workers: int) -> None:
    source = open_labelled("set", "set", "image", str(folder.parent))
    files = {}
    for number, label in enumerate(labels_of(source).tolist()):
        files[f"{number:03d}.jpg"] = source.read(0, number)["jpg"]
        files[f"{number:03d}.cls"] = str(label).encode()
    (folder.parent / "packed").mkdir()
    write_tar(folder.parent / "packed" / "0.tar", files)
    packed = open_labelled("packed", "packed", "image", str(folder.parent))
    data = DataConfig(resolution=16, workers=workers)
    found = [extract(s, lambda x: x.flatten(1).float(), data, 5) for s in (source, packed)]
    assert torch.equal(found[0].rows, found[1].rows)
    assert torch.equal(found[0].labels, found[1].labels)
    assert torch.equal(labels_of(source), found[0].labels)


def test_a_csv_of_labels_and_captions(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "set.csv"
    table.write_text(
        "path,label,caption\nset/ant/ant0.jpg,ant,an ant\nset/zebra/zebra0.jpg,zebra,stripes\n"
        'set/ant/ant0.jpg,ant,"small, black"\n',
        encoding="utf-8-sig",
    )
    source = open_labelled("set", str(table), "image")
    assert len(source) == 2 and source.classes == ("ant", "zebra")
    assert labels_of(source).tolist() == [0, 1]
    assert read_all_captions(source) == [["an ant", "small, black"], ["stripes"]]
    table.write_text("path,label\nset/ant/ant0.jpg,7\nset/zebra/zebra0.jpg,2\n")
    numbered = open_labelled("set", str(table), "image")
    assert numbered.classes == () and labels_of(numbered).tolist() == [7, 2]


def test_sets_of_other_numbers_meet_by_name(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "test.csv"
    table.write_text("path,label\nset/zebra/zebra0.jpg,zebra\nset/ant/ant0.jpg,ant\n")
    train = open_labelled("a", str(folder), "image")
    test = open_labelled("b", str(table), "image")
    assert labels_of(test).tolist() == [1, 0]
    assert renumber(labels_of(test), test, train.classes, "a").tolist() == [2, 0]
    assert renumber(torch.tensor([1, -1]), test, train.classes, "a").tolist() == [2, -1]
    with pytest.raises(DataError, match="class 'sea horse' of a is not among b"):
        renumber(labels_of(train), train, test.classes, "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("where,label\na,1\n", "has no column of files"),
        ("path,score\nset/ant/ant0.jpg,1\n", "has neither a column `label` nor"),
        ("", "has no rows"),
        ("path,label\n", "has no rows"),
        ("path,label\nset/ant/ant0.jpg,ant\nset/ant/no.jpg,ant\n", "row 2: no file"),
        ("path,label\nset/ant/ant0.jpg,\n", "row 1: label is empty"),
        ("path,label\n,ant\n", "row 1: no file .*row 1 names no file"),
        ("path,caption\nset/ant/ant0.jpg,x\nset/ant/ant1.jpg\n", "row 2: caption is empty"),
        (
            "path,label\nset/ant/notes.txt,ant\n",
            "row 1: .*notes.txt is not of modality image: .* must be jpg",
        ),
        ("path,label\nset/ant/ant0.jpg,a\nset/ant/ant0.jpg,b\n", "row 2: set/ant/ant0.jpg is 'b'"),
        ("path,caption\nset/ant/ant0.jpg,an ant, black\n", "line 2: more cells than the header"),
        ('path,caption\nset/ant/ant0.jpg,"an ant\nset/ant/ant1.jpg,two\n', "line 3: .*quote cells"),
    ],
)
def test_a_csv_with_mistakes_names_the_row(
    folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    table = tmp_path / "set.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=message):
        open_labelled("set", str(table), "image")


def test_folders_that_are_one_class_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(("ice cream", "ice_cream", "zebra")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(photo(number))
    source = open_labelled("set", str(tmp_path), "image")
    assert labels_of(source).tolist() == [0, 0, 1]
    assert "only _ and spaces differ: ['ice cream']" in caplog.text


def test_folders_without_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no class names"):
        open_labelled("set", str(folder / "ant" / "more"), "image")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no image files"):
        open_labelled("set", str(folder), "image")
    with pytest.raises(DataError, match=r"set\.csv does not exist"):
        open_labelled("set", str(tmp_path / "set.csv"), "image")
    with pytest.raises(DataError, match="nothing does not exist"):
        open_labelled("set", str(tmp_path / "nothing"), "image")


def test_a_broken_picture_is_named(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, format="JPEG")
    (folder / "ant" / "ant1.jpg").write_bytes(buffer.getvalue()[:100])
    source = open_labelled("set", str(folder), "image")
    with pytest.raises(DataError, match=r"'ant/ant1' of .*set cannot be used"):
        extract(source, lambda x: x.flatten(1).float(), DataConfig(resolution=16, workers=0))


def test_names_in_the_json_of_shards_are_numbered(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number, name in enumerate(("wave", "fall_down", "wave", "")):
        files[f"{number}.jpg"] = photo(number)
        files[f"{number}.json"] = json.dumps({"label": name, "caption": "x"}).encode()
    write_tar(tmp_path / "0.tar", files)
    source = open_labelled("set", str(tmp_path), "image")
    assert source.classes == ("fall down", "wave")
    assert labels_of(source).tolist() == [1, 0, 1, -1]
    assert read_all_captions(source) == [["x"]] * 4
    found = extract(source, lambda x: x.flatten(1).float(), DataConfig(resolution=8, workers=2))
    assert found.labels.tolist() == [1, 0, 1, -1]


def labelled(folder: Path, name: str, labels: list[object]) -> Source:
    """Shards whose json says a label, or nothing."""
    files: dict[str, bytes] = {}
    for number, label in enumerate(labels):
        files[f"{number:02d}.jpg"] = photo(number)
        files[f"{number:02d}.json"] = json.dumps({} if label is None else {"label": label}).encode()
    (folder / name).mkdir()
    write_tar(folder / name / "0.tar", files)
    return open_labelled(name, str(folder / name), "image")


def test_numbers_as_text_are_numbers(tmp_path: Path) -> None:
    source = labelled(tmp_path, "set", [str(n) for n in range(12)])
    assert labels_of(source).tolist() == list(range(12)) and source.classes == ()


def test_packed_folders_meet_by_name(tmp_path: Path) -> None:
    """The numbers that packing gives are a folder's own."""
    for folder, classes in (("train", ("ant", "bee", "cat_dog")), ("test", ("cat_dog", "bee"))):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / folder / name / "1.png")
        pack(tmp_path / folder, tmp_path / f"{folder}_packed", PackConfig())
    train, test = (
        open_labelled(name, str(tmp_path / f"{name}_packed"), "image") for name in ("train", "test")
    )
    assert train.classes == ("ant", "bee", "cat dog") and labels_of(train).tolist() == [0, 1, 2]
    assert renumber(labels_of(test), test, train.classes, "train").tolist() == [1, 2]


def test_numbers_beside_names_give_their_order(tmp_path: Path) -> None:
    facts = [{"label": 1, "label_name": "ant"}, {"label": 0, "label_name": "bee"}]
    files = {f"{n}.jpg": photo(n) for n in range(2)}
    files |= {f"{n}.json": json.dumps(own).encode() for n, own in enumerate(facts)}
    write_tar(tmp_path / "0.tar", dict(sorted(files.items())))
    source = open_labelled("set", str(tmp_path), "image")
    assert source.classes == ("bee", "ant") and labels_of(source).tolist() == [1, 0]


def test_names_are_compared_without_case_and_underscores_if_none_is_the_same() -> None:
    known = ["Sea_Horse", "ant", "Ant", "zebra", "ant"]
    names = ["sea horse", "Ant", "ant", "ZEBRA", "Zebra", "ANT", "bee"]
    assert numbers_of(names[:3], known) == {"sea horse": 0, "Ant": 2, "ant": 1}
    assert numbers_of(names[3:4], known) == {"ZEBRA": 3}
    assert numbers_of(names[3:], known) == {}  # two zebras, and two ants to choose from


def test_names_and_numbers_are_matched_by_position_with_a_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = open_labelled("named", str(folder), "image")
    for numbers in ([2, 1, 0], [0, 1, 1]):
        other = labelled(tmp_path, f"numbers{numbers[0]}", numbers)
        classes = Classes.of(labels_of(other), other)
        if numbers[0]:
            assert classes.places(labels_of(named), named).tolist() == labels_of(named).tolist()
            own = Classes.of(labels_of(named), named)
            assert own.places(labels_of(other), other).tolist() == numbers
        else:
            with pytest.raises(DataError, match="named has 3 class names, and numbers0 has only"):
                classes.places(labels_of(named), named)
    line = "named has class names, and numbers2 only numbers: classes are matched by position"
    assert caplog.text.count(line) == 2  # once for each set that is matched


def test_classes_of_a_training_set(tmp_path: Path) -> None:
    train = labelled(tmp_path, "train", [7, 2_000_000, 7, 12])
    classes = Classes.of(labels_of(train), train)
    assert classes.places(labels_of(train), train).tolist() == [0, 2, 0, 1]
    test = labelled(tmp_path, "test", [12, 8])
    with pytest.raises(DataError, match="class 8 of test is not among the 3 classes of train"):
        classes.places(labels_of(test), test)
    some = labelled(tmp_path, "some", ["ant", "bee", None])
    with pytest.raises(DataError, match="1 of 3 have none"):
        Classes.of(torch.tensor([0, 1]), some).places(labels_of(some), some)
    with pytest.raises(DataError, match="is too large"):
        labels_of(labelled(tmp_path, "large", [10**22, 1]))


def test_labels_of_files_are_kept_for_the_next_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their table and its summary are two files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table, vocabulary = tmp_path / "set.csv", Vocabulary(("insect", "stripes", "leg"), (1, 1, 1))

    def rows(second: str) -> list[list[int]]:
        """Read the tags of two pictures, the first of which has two rows."""
        insects = "set/ant/ant0.jpg,#insect\n", f"set/ant/ant0.jpg,{second}\n"
        table.write_text("".join(["path,tags\n", *insects, "set/zebra/zebra0.jpg,stripes leg\n"]))
        source = open_labelled("set", str(table), "image", captions=("tags",))
        work = tag_labels.Labeller(source, "hashtags", TagRules("tags"), vocabulary)
        labels = tag_labels.label(work)
        return [labels.row(0, member, "ids").tolist() for member in range(2)]

    assert rows("leg") == rows("leg") == [[0, 2], [1, 2]]
    assert len([*(tmp_path / "cache" / "xray" / "index").iterdir()]) == 2
    assert rows("#insect") == [[0], [1, 2]]
