"""`xray init`: its look at the data, and the evaluation that follows from it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from shards import photo, write_tar
from surveys import CAPTIONED, LAPTOP, found

from xray.errors import DataError
from xray.recipes.first_recipe import draft, scales_for
from xray.recipes.survey import Survey, survey


def test_folders_of_shards_are_found_with_their_contents(demo: Path) -> None:
    seen = survey(str(demo))
    names = {own.name: own for own in seen.training}
    assert {"photos", "clips"} <= names.keys() and [own.name for own in seen.held_out] == [
        "heldout"
    ]
    photos, clips = names["photos"], names["clips"]
    assert (photos.samples, photos.modality, photos.side) == (96, "image", 32)
    assert (clips.samples, clips.modality, clips.side) == (24, "video", 32)
    assert photos.captioned == photos.tagged == 1.0 and photos.captions == 3.0
    alone = survey(str(demo / "photos"))
    assert [(own.name, own.shards) for own in alone.training] == [("images", ".")]


def shard(folder: Path, classes: str = "", samples: int = 2) -> None:
    """Write a shard whose samples have these classes in turn, one letter each."""
    files = {}
    for number in range(samples):
        own = {"label_name": classes[number % len(classes)]} if classes else {"caption": "a dog"}
        files[f"{number}.jpg"] = photo(number, (16, 16))
        files[f"{number}.json"] = json.dumps(own).encode()
    write_tar(folder / "0.tar", files)


def sources(root: Path) -> tuple[list[str], list[str]]:
    seen = survey(str(root))
    return [own.shards for own in seen.training], [own.shards for own in seen.held_out]


def test_all_that_is_in_a_folder_val_or_test_is_held_out(tmp_path: Path) -> None:
    for place in ("train/images", "val/images", "test/images", "more_val/train", "val2017"):
        shard(tmp_path / place)
    assert sources(tmp_path) == (
        ["more_val/train", "train/images"], ["test/images", "val/images", "val2017"]
    )  # fmt: skip


def test_plain_folders_are_divided_at_val(tmp_path: Path) -> None:
    for kind, part in itertools.product(("images", "photos"), ("train", "val")):
        for own, number in itertools.product(("cat", "dog"), range(10)):
            path = tmp_path / kind / part / own / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(number, (16, 16)))
    assert sources(tmp_path) == (["images/train", "photos/train"], ["images/val", "photos/val"])
    seen = survey(str(tmp_path / "images"))
    assert [own.classes for own in (*seen.training, *seen.held_out)] == [{"cat", "dog"}] * 2
    settings = draft(scales_for(seen, LAPTOP, "")[0], seen, LAPTOP).settings
    assert settings["eval"]["knn"] == {"train": "train", "test": "val"}
    (tmp_path / "images" / "0.jpg").write_bytes(photo(0, (16, 16)))
    with pytest.raises(DataError, match=r"has val/, which is for evaluation, and other files"):
        survey(str(tmp_path / "images"))


def test_sources_of_similar_folders_have_different_names(tmp_path: Path) -> None:
    for place in ("set-a", "set_a", "set.a"):
        shard(tmp_path / place)
    assert [own.name for own in survey(str(tmp_path)).training] == ["set_a", "set_a_2", "set_a_3"]


def test_knn_compares_sets_of_the_same_classes(tmp_path: Path) -> None:
    for place, classes, samples in (
        ("birds", "ab", 20), ("few", "pq", 19), ("flowers", "xyz", 21),
        ("birds_val", "abc", 3), ("few_val", "pq", 2), ("one_val", "xx", 2),
    ):  # fmt: skip
        shard(tmp_path / place, classes, samples)
    for chosen in ({}, {"knn": {"train": "flowers", "test": "flowers_val"}}):
        seen = survey(str(tmp_path))
        settings = draft(scales_for(seen, LAPTOP, "")[0], seen, LAPTOP).settings["eval"]
        assert settings == {"held_out": True, **chosen}
        shard(tmp_path / "flowers_val", "zx", 2)


def test_retrieval_needs_two_pictures_with_captions() -> None:
    for samples, there in ((1, False), (2, True)):
        seen = Survey("d", [found(**CAPTIONED)], [found("val", samples=samples, **CAPTIONED)])
        settings = draft(scales_for(seen, LAPTOP, "")[0], seen, LAPTOP).settings
        assert ("retrieval" in settings["eval"]) == there


def test_plain_photos_with_captions_are_counted(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number, (60, 40)))
        if number < 4:
            (tmp_path / f"{number}.txt").write_text("a dog\na ball\n")
    (own,) = survey(str(tmp_path)).training
    assert (own.samples, own.side, own.captioned, own.captions) == (8, 40, 0.5, 2.0)


def test_real_data_are_described(shared_data: Path) -> None:
    seen = survey(str(shared_data))
    names = {own.name: own for own in seen.training}
    assert names["captions_train"].samples == 6090 and names["captions_train"].captions == 5.0
    assert names["actions_train"].tagged == 1.0 and names["actions_train"].label == "label"
    assert names["classes_val_probe_train"].labelled == 1.0
    held = {own.name for own in seen.held_out}
    assert held == {"captions_val", "actions_val", "classes_val_val"}
    settings = draft(scales_for(seen, LAPTOP, "")[0], seen, LAPTOP).settings
    assert settings["eval"]["retrieval"] == {"shards": "captions_val"}
    knn = {"train": "classes_val/probe_train", "test": "classes_val/val"}
    assert settings["eval"]["knn"] == knn
