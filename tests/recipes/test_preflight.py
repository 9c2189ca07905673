"""Preflight: errors of later stages are found before the first stage trains."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from child_process import RECIPE
from in_process import invoke
from shards import photo, write_tar

from data_pipelines.ingest.labelled import place_of
from data_pipelines.shards.source import make_cache
from stages.hashtag import find_vocabulary
from stages.hashtag_config import HashtagOptions
from xray.ablations.spec import read_ablation
from xray.artifacts.language_model import Language
from xray.errors import ArtifactError, ConfigError, DataError
from xray.recipes.recipe import load_recipe
from xray.recipes.run import preflight, prepare
from xray.training.deepspeed_setup import init_distributed


def check_recipe(demo: Path, out: Path, *overrides: str) -> None:
    recipe = load_recipe(str(RECIPE), [f"data.root={demo}", f"out={out}", *overrides])
    init_distributed(torch.device("cpu"))
    preflight(recipe.runs, recipe.eval, recipe.root)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of photos with one caption each and no tags."""
    root = tmp_path_factory.mktemp("plain")
    files = {}
    for number in range(12):
        files[f"{number:02d}.jpg"] = photo(number)
        files[f"{number:02d}.json"] = json.dumps({"caption": f"dog {number} with a ball"}).encode()
    write_tar(root / "0.tar", files)
    return root


def test_a_complete_recipe_passes_and_writes_nothing(demo: Path, tmp_path: Path) -> None:
    check_recipe(demo, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["stages=[mae,clip]", "clip.text.llm=/nope"], ConfigError, "text.llm=/nope"),
        (["text.llm=/nope", "stages=[mae,text]"], ConfigError, "text.llm=/nope"),
        (["eval.zero_shot.shards=nope"], ConfigError, "eval.zero_shot.shards=nope: there is no"),
        (["eval.zero_shot.classes=no.txt"], ConfigError, "eval.zero_shot.classes=no.txt"),
        (
            ["stages=[mae,hashtag,clip]", "eval.tags.own.shards=nope"],
            ConfigError,
            "eval.tags.own.shards=nope: there is no",
        ),
        (
            ["stages=[mae,text,clip]", "eval.captions.shards=nope"],
            ConfigError,
            "eval.captions.shards=nope: there is no",
        ),
        (["eval.knn.test=no*"], DataError, "no .tar shards at"),
        (["hashtag.vocabulary=no.json"], ArtifactError, "no.json does not exist"),
        (["clip.data.sources.photos.shards=missing"], DataError, "missing does not exist"),
    ],
)
def test_a_missing_file_is_named_by_its_key(
    demo: Path, tmp_path: Path, overrides: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_recipe(demo, tmp_path, *overrides)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            "mae,hashtag",
            r"0 of 12 have a tag\): .*data.sources.photos.tags=.*leave out the has",
        ),
        ("mae,text", r"has two captions, which stage text compares: leave it out \(stages="),
    ],
)
def test_data_that_a_stage_cannot_learn_from_is_refused(
    demo: Path, plain: Path, tmp_path: Path, stages: str, words: str
) -> None:
    blocks = "data.blocks=[{source: photos, samples: 4}]"
    with pytest.raises(DataError, match=words):
        check_recipe(
            demo, tmp_path, f"stages=[{stages}]", f"data.sources.photos.shards={plain}", blocks
        )
    captions = "hashtag.min_count=1", "data.sources.photos.tags=caption_words"
    shards = f"data.sources.photos.shards={plain}"
    check_recipe(demo, tmp_path, "stages=[mae,hashtag,clip]", shards, blocks, *captions)


def test_the_labels_and_captions_of_the_evaluation_are_checked(
    demo: Path, plain: Path, tmp_path: Path
) -> None:
    for classes in (("cat", "dog"), ("cat", "owl")):
        for name in classes:
            place = tmp_path / classes[1] / name / "0.jpg"
            place.parent.mkdir(parents=True)
            place.write_bytes(photo(0, (16, 16)))
    sets = f"{{train: {tmp_path / 'dog'}, test: {tmp_path / 'owl'}"
    stages = "stages=[mae,text,clip]"
    for given, words in (
        (f"eval.knn={sets}, k: 1}}", "class 'owl' of eval.knn.test is not among the classes"),
        (f"eval.knn={sets.replace('owl', 'dog')}}}", "kNN with k=5 needs that many samples"),
        (f"eval.zero_shot.shards={plain}", "eval.zero_shot needs a class for every sample"),
        (f"eval.captions.shards={plain}", "two captions"),
        (f"eval.compression.shards={plain}", ""),  # on a model that is yet to train
    ):
        with pytest.raises((ConfigError, DataError), match=words) if words else nullcontext():
            check_recipe(demo, tmp_path / "out", stages, given)


def test_a_tilde_is_the_home_folder_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    demo = "{photos: 8, clips: 2, heldout: 2, per_shard: 8, side: 16, frames: 2}"
    recipe = load_recipe(
        "quickstart",
        ["data.root=~/data", "out=~/run", f"prepare.demo={demo}", "prepare.llm.vocab_size=300",
         "clip.out=~/clip", "data.cache=~/shards", "mae.model.pretrained=~/w.safetensors"],
    )  # fmt: skip
    prepare(recipe)
    assert (home / "data" / "photos").is_dir() and (home / "data" / "llm" / "config.json").is_file()
    assert recipe.out == home / "run" and recipe.runs[0].out == str(home / "run" / "mae")
    assert recipe.runs[-1].out == str(home / "clip")
    assert recipe.runs[0].model.pretrained == str(home / "w.safetensors")
    assert recipe.runs[0].data.root == "~/data"  # as older runs recorded it
    assert make_cache(recipe.runs[0].data).folder == home / "shards"
    language = Language(replace(recipe.runs[-1].text, llm="~/data/llm"))  # type: ignore[attr-defined]
    assert language.config.llm == str(home / "data" / "llm")
    options = HashtagOptions(vocabulary="~/tags.json")
    with pytest.raises(ArtifactError, match=str(home / "tags.json")):
        find_vocabulary(recipe.runs[1], options, {})
    assert read_ablation("stages", ["out=~/arms"]).config.out == str(home / "arms")
    for command in (("index", "~/data/photos"), ("split", "~/data/photos", home / "halves")):
        done = invoke("data", *command)
        assert done.exit_code == 0, done.stderr
    assert not any((tmp_path / "work").iterdir())


def test_nothing_trains_if_preflight_fails(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = f"data.root={demo}", f"out={out}", "stages=[mae,clip]", "clip.text.llm=/nope"
    done = invoke("run", RECIPE, *settings)
    assert done.exit_code == 2 and "text.llm=/nope" in done.stderr + done.stdout
    assert not out.exists()


def test_a_relative_set_is_in_the_data_root_or_else_in_the_working_folder(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "xray")
    shutil.copytree(demo / "heldout", tmp_path / "here")
    check_recipe(demo, tmp_path / "run", "eval.retrieval.shards=here")
    assert place_of("eval.a", "here", str(demo)) == "here"
    assert place_of("eval.a", "here/*.tar", str(demo)) == "here/*.tar"
    assert "is used" not in caplog.text
    shutil.copytree(demo / "heldout", tmp_path / "heldout")
    for _ in range(2):
        assert place_of("eval.b", "heldout", str(demo)) == str(demo / "heldout")
    line = f"eval.b: {demo / 'heldout'} in data.root is used, not {tmp_path / 'heldout'} in the"
    assert caplog.text.count(line) == 1
    assert place_of("eval.b", "heldout", "") == "heldout"
    assert place_of("eval.b", "heldout", "http://x.org/data") == "http://x.org/data/heldout"
    shutil.copytree(demo / "heldout", tmp_path / "mine_shards" / "val")
    (tmp_path / "mine").mkdir()  # packed before, with samples held out
    assert place_of("eval.c", "val", "mine") == "mine_shards/val"
    words = f"there is no {demo / 'nope'}, nor nope in the working folder"
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_recipe(demo, tmp_path / "run", "eval.retrieval.shards=nope")


def test_an_ablation_trains_nothing_if_a_set_is_missing(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("arms:\n  one: {}\n  two: {eval.knn.test: nope}\n")
    given = f"base={RECIPE}", f"data.root={demo}", f"out={tmp_path / 'out'}", "stages=[mae]"
    done = invoke("ablate", file, *given)
    assert done.exit_code == 2 and "eval.knn.test=nope: there is no" in done.stderr, done.stderr
    assert not any((tmp_path / "out").glob("stages/*"))
