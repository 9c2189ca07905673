"""Training straight from plain files: packed once, found again, and refused if they change."""

from __future__ import annotations

import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from child_process import RECIPE, torchrun
from clips import film
from in_process import invoke
from shards import photo

from data_pipelines.ingest import auto_pack, user_data
from data_pipelines.ingest.auto_pack import pack_sources
from data_pipelines.ingest.pack import PackConfig, pack
from data_pipelines.ingest.user_data import open_sources
from xray.ablations.trials import load_ablation
from xray.config import BlockConfig, DataConfig, SourceConfig
from xray.errors import ConfigError, DataError
from xray.recipes.own_data import recipe_settings
from xray.recipes.recipe import load_recipe

SOURCES = ("photos", "clips")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tiny recipe without an evaluation."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(Path(RECIPE).read_text().partition("eval:")[0])
    return str(path)


def photos(folder: Path, count: int = 20, captions: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"IMG {number}.jpg").write_bytes(photo(number))
        if captions:
            (folder / f"IMG {number}.txt").write_text(f"dog {number}\nthe dog {number}\n")
    return folder


def clips(folder: Path, count: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.mp4").write_bytes(film(frames=4 + number))
        (folder / f"{number}.txt").write_text(f"dog {number} runs")
    return folder


def data_of(root: Path | str = "", **shards: str) -> DataConfig:
    given = {"photos": "photos", "clips": "clips"} | shards
    sources = {
        name: SourceConfig(given[name], "image" if name == "photos" else "video")
        for name in SOURCES
    }
    blocks = [BlockConfig(name, 4) for name in SOURCES]
    return DataConfig(sources=sources, blocks=blocks, root=str(root))


def test_a_folder_is_packed_once_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "mine")
    command = "run", recipe, "stages=[mae,hashtag]", "data.root=mine/", "out=run"
    tags = "data.sources.photos.tags=caption_words", "hashtag.min_count=1"
    first = invoke(*command, *tags)
    assert first.exit_code == 0, first.stderr
    assert "mine/: packed 20 samples in 1 shard in mine_shards" in first.stderr, first.stderr
    assert "20 have captions" in first.stderr
    assert "no clips: source clips is left out (data.modalities=[image])" in first.stderr
    again = invoke(*command, *tags)
    assert again.exit_code == 0 and "packed" not in again.stderr, again.stderr
    assert "mine/: training on its shards in mine_shards" in again.stderr
    assert again.stderr.count("is finished") == 2
    config = "run/mae/config.yaml"
    other = invoke("train", "mae", config, "out=other", "train.samples=16")
    assert other.exit_code == 0, other.stderr  # the recorded config names the shards
    with tarfile.open("mine_shards/00000.tar") as tar:
        stamp = {name: os.stat(f"mine_shards/{name}").st_mtime_ns for name in ("00000.tar",)}
        assert any(name.endswith(".txt") for name in tar.getnames())
    (tmp_path / "mine" / "IMG 3.txt").write_text("another text")
    changed = invoke(*command, *tags)
    assert changed.exit_code == 2 and "data.root: the files of mine/ have changed" in changed.stderr
    assert stamp == {name: os.stat(f"mine_shards/{name}").st_mtime_ns for name in stamp}
    # Both ways out that the error names.
    kept = invoke(*command[:3], "data.root=mine_shards", *command[4:], *tags)
    assert kept.exit_code == 0 and kept.stderr.count("is finished") == 2, kept.stderr
    shutil.rmtree("mine_shards")
    assert "packed 20 samples" in invoke(*command, *tags, "out=third").stderr


def test_a_stage_trains_on_a_folder_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "mine")
    sources = "data.sources.photos.shards=mine", "data.blocks=[{source: photos, samples: 4}]"
    short = "model=vit_demo", "data.resolution=32", "data.workers=0", "train.samples=8"
    done = invoke("train", "mae", *sources, *short, "train.precision=fp32", "out=run")
    assert done.exit_code == 0, done.stderr
    assert "mine: packed 20 samples" in done.stderr
    again = invoke("train", "mae", "--resume", "run")
    assert again.exit_code == 0 and "is finished" in again.stderr, again.stderr
    recorded = json.loads(Path("run/run.json").read_text())["config"]["data"]["sources"]
    assert recorded["photos"]["shards"] == "mine_shards"
    same = invoke("train", "mae", *sources, *short, "train.precision=fp32", "out=run")
    assert same.exit_code == 0 and "is finished" in same.stderr, same.stderr


def as_csv(root: Path) -> Path:
    rows = "".join(f"mine/IMG {number}.jpg,dog {number}\n" for number in range(4))
    (root / "list.csv").write_text(f"image,caption\n{rows}")
    return root / "list.csv"


def as_parquet(root: Path) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": photo(number), "path": f"{number}.jpg"} for number in range(4)]
    table = arrow.table({"image": cells, "caption": ["dog"] * 4})
    parquet.write_table(table, root / "list.parquet")
    return root / "list.parquet"


def as_imagefolder(root: Path) -> Path:
    rows = "".join(f"IMG {number}.jpg,dog {number}\n" for number in range(4))
    (root / "mine" / "metadata.csv").write_text(f"file_name,text\n{rows}")
    return root / "mine"


@pytest.mark.parametrize("form", [as_csv, as_parquet, as_imagefolder])
def test_tables_and_imagefolders_are_packed(
    tmp_path: Path, form: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "xray")
    photos(tmp_path / "mine", 4, captions=False)
    where = form(tmp_path)  # type: ignore[operator]
    folder = str(where.with_suffix("")) + "_shards"
    expected = [
        "data.sources.photos.shards=.", "data.sources.clips.shards=.", f"data.root={folder}",
        "data.modalities=[image]",
    ]  # fmt: skip
    assert sorted(pack_sources(data_of(where), SOURCES)) == sorted(expected)
    assert "4 have captions" in caplog.text
    assert (Path(folder) / "val" / "00000.tar").is_file()  # held out
    assert sorted(pack_sources(data_of(where), SOURCES)) == sorted(expected)
    by_resume = data_of(where, photos=".", clips=".")  # as an earlier run has recorded it
    assert sorted(pack_sources(by_resume, SOURCES)) == sorted(expected)


def test_pictures_and_clips_go_to_their_sources(tmp_path: Path) -> None:
    root = photos(clips(tmp_path / "mixed"))
    settings = pack_sources(data_of(root), SOURCES)
    assert sorted(settings) == [
        f"data.root={root}_shards",
        "data.sources.clips.shards=clips",
        "data.sources.photos.shards=photos",
    ]
    packed = data_of(f"{root}_shards")
    held = {name: len(own) for name, own in open_sources(packed, SOURCES).items()}
    assert held == {"photos": 16, "clips": 6}  # the others are held out
    assert sorted(pack_sources(data_of(root), SOURCES)) == sorted(settings)
    assert pack_sources(packed, SOURCES) == []
    apart = tmp_path / "apart"
    photos(apart / "photos"), clips(apart / "clips")
    settings = pack_sources(data_of(apart), SOURCES)
    assert settings == [
        "data.sources.photos.shards=photos_shards", "data.sources.clips.shards=clips_shards"
    ]  # fmt: skip
    shutil.rmtree(apart / "clips")
    assert pack_sources(data_of(apart), SOURCES)[1:] == ["data.modalities=[image]"]
    shards = tmp_path / "shards"
    pack(apart / "photos", shards / "photos", PackConfig())
    assert pack_sources(data_of(shards), SOURCES) == []  # a missing folder of shards stays an error
    assert pack_sources(data_of(shards / "photos"), SOURCES) == [
        "data.sources.photos.shards=.", "data.sources.clips.shards=.", "data.modalities=[image]"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "held"), [(1, 1), (20, 4), (500, 100), (1_000, 100), (2_000, 100), (10_000, 500)]
)
def test_few_samples_hold_out_a_larger_share(samples: int, held: int) -> None:
    assert math.ceil(auto_pack.held_out_share(samples) * samples) == held


def test_nothing_is_packed_for_a_plan_or_for_data_yet_to_be_made(
    tmp_path: Path, recipe: str
) -> None:
    root = photos(tmp_path / "mine", 4)
    settings = pack_sources(data_of(root), SOURCES, write=False)
    assert f"data.root={root}" in settings and "data.modalities=[image]" in settings
    assert pack_sources(data_of(root), SOURCES, use_root=False) == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    given = f"data.root={root}", f"out={tmp_path / 'o'}"
    plan = invoke("run", recipe, "--plan", *given)
    assert plan.exit_code == 0 and "clips\n" not in plan.stdout, plan.stderr
    clips(root)  # the two sources are packed apart
    length = "stages=[mae]", "mae.train.epochs=3"
    plan = invoke("plan", recipe, *given, *length, "--json")
    assert plan.exit_code == 0, plan.stderr
    (stage,) = json.loads(plan.stdout)["stages"]
    assert stage["epochs"] == {"photos": 12, "clips": 3}  # steps of 8 and 4 samples, 4 and 8 files
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_packing_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, folder = photos(tmp_path / "mine", 6), tmp_path / "mine_shards"
    whole = auto_pack.pack

    def interrupted(*given: object) -> None:
        monkeypatch.setattr("data_pipelines.ingest.pack._merge_skipped", stop)
        whole(*given)  # type: ignore[arg-type]

    def stop(out: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(auto_pack, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack_sources(data_of(root), SOURCES)
    monkeypatch.undo()
    assert folder.is_dir() and not (folder / "pack_skipped.jsonl").exists()
    assert f"data.root={folder}" in pack_sources(data_of(root), SOURCES)
    assert (folder / "pack_skipped.jsonl").is_file() and (folder / "val" / "pack.json").is_file()


def test_shards_packed_by_hand_are_used_with_their_settings(tmp_path: Path) -> None:
    root = photos(tmp_path / "mine", 6)
    pack(root, tmp_path / "mine_shards", PackConfig(short_side=16, per_shard=2))
    assert f"data.root={root}_shards" in pack_sources(data_of(root), SOURCES)
    assert len([*(tmp_path / "mine_shards").glob("*.tar")]) == 3


def test_a_folder_that_cannot_be_written_beside_is_packed_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(user_data.os, "access", lambda path, mode: mode != os.W_OK)
    root = photos(tmp_path / "read.only" / "my.photos", 4)
    setting = next(s for s in pack_sources(data_of(root), SOURCES) if s.startswith("data.root="))
    folder = Path(setting.removeprefix("data.root="))
    assert folder.parent == tmp_path / "cache" / "xray" / "packed" and any(folder.glob("*.tar"))
    assert setting in pack_sources(data_of(root), SOURCES)
    monkeypatch.undo()
    assert user_data.shards_beside(str(root)) == f"{root}_shards"


def test_a_folder_for_evaluation_is_not_trained_on(tmp_path: Path) -> None:
    root = photos(tmp_path / "mine", 3)
    assert any("shards=" in item for item in pack_sources(data_of(root), SOURCES, write=False))
    photos(root / "val", 3)
    with pytest.raises(ConfigError, match=r"mine contains val/, .* xray init mine\.yaml .*/mine"):
        pack_sources(data_of(root), SOURCES)
    photos(tmp_path / "other" / "test", 3)  # all of it
    assert pack_sources(data_of(tmp_path / "other"), SOURCES)


def test_a_root_without_data(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match=r"phots does not exist; did you mean .*photos'\?"):
        pack_sources(data_of(tmp_path / "phots"), SOURCES)
    with pytest.raises(ConfigError, match=r"contains neither \.tar shards nor pictures or clips"):
        pack_sources(data_of(tmp_path / "photos"), SOURCES)
    assert pack_sources(data_of(tmp_path / "photos"), SOURCES, write=False) == []  # for a plan


@pytest.mark.parametrize(
    ("sources", "error", "words"),
    [
        ({"clips": "a"}, DataError, r"there are no clips for the sources clips"),
        (
            {"photos": "a", "more": "b"},
            ConfigError,
            "both more and photos would read its",
        ),
    ],
)
def test_files_that_do_not_fit_the_sources(
    tmp_path: Path, sources: dict[str, str], error: type[Exception], words: str
) -> None:
    data = DataConfig(root=str(photos(tmp_path / "mine", 4)))
    data.sources = {
        name: SourceConfig(shards, "video" if name == "clips" else "image")
        for name, shards in sources.items()
    }
    with pytest.raises(error, match=words):
        pack_sources(data, sorted(sources))


def test_an_evaluation_set_inside_the_training_files_is_refused(
    tmp_path: Path, recipe: str
) -> None:
    root = photos(tmp_path / "mine", 4)
    photos(root / "heldout", 2)
    given = [f"data.root={root}", f"out={tmp_path / 'o'}", "stages=[mae]"]
    sets = ["eval.retrieval.shards=heldout"]
    with pytest.raises(ConfigError, match=r"eval.retrieval.shards=heldout is inside data.root="):
        recipe_settings(load_recipe(recipe, [*given, *sets]), write=False)
    outside = photos(tmp_path / "heldout", 2)
    sets = [f"eval.retrieval.shards={outside}"]
    assert recipe_settings(load_recipe(recipe, [*given, *sets]), write=False)


def test_two_ranks_train_on_a_folder_that_one_packs(tmp_path: Path, recipe: str) -> None:
    root = photos(tmp_path / "mine")
    out = f"out={tmp_path / 'run'}"
    given = f"data.root={root}", out, "stages=[mae]", "mae.train.epochs=1"
    stderr = torchrun("-m", "xray", "run", recipe, *given)
    assert stderr.count("packed 20 samples") == 1, stderr
    assert (tmp_path / "run" / "mae" / "artifact" / "manifest.json").is_file()


def test_metrics_of_an_ablation_may_be_of_samples_that_packing_holds_out(
    tmp_path: Path, recipe: str
) -> None:
    root = photos(tmp_path / "mine")
    file = tmp_path / "two.yaml"
    file.write_text(
        f"base: {recipe}\ncommon: {{stages: [mae, clip], eval.held_out: true}}\n"
        "arms:\n  one: {}\n  two: {mae.train.samples: 8}\n"
        "metrics: [retrieval.text_to_image_R@5, knn.top1]\n"
    )
    before = load_ablation(str(file), [f"data.root={root}"])
    packed = recipe_settings(before.trials[0].recipe)
    with pytest.raises(ConfigError, match=r"'knn\.top1' is not a metric"):  # there are no classes
        load_ablation(str(file), [f"data.root={root}", *packed])
    captions = "metrics=[retrieval.text_to_image_R@5]"
    assert load_ablation(str(file), [f"data.root={root}", *packed, captions]).trials


def test_an_ablation_packs_before_its_runs(tmp_path: Path, recipe: str) -> None:
    root = photos(tmp_path / "mine")
    settings = f"base={recipe}", f"data.root={root}", f"out={tmp_path / 'ab'}", "stages=[mae]"
    file = tmp_path / "two.yaml"
    file.write_text("arms:\n  one: {}\n  two: {eval.knn.test: nope, eval.knn.train: nope}\n")
    plan = invoke("ablate", str(file), *settings, "--plan")
    assert plan.exit_code == 0, plan.stderr
    assert not (tmp_path / "mine_shards").exists()
    done = invoke("ablate", str(file), *settings)  # a missing set ends it before anything trains
    assert done.exit_code == 2 and f"there is no {root}_shards/nope" in done.stderr, done.stderr
    assert done.stderr.count("packed 20 samples") == 1
