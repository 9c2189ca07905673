"""`xray init`: its rules, and a recipe that runs as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from in_process import invoke
from shards import photo
from surveys import CAPTIONED, LAPTOP, found

from xray.artifacts.artifact import find_manifest
from xray.config.model import LlmConfig
from xray.errors import ArtifactError, ConfigError, DataError
from xray.recipes.first_recipe import LENGTHS, Draft, draft, scales_for
from xray.recipes.init import _divided, _next
from xray.recipes.machine import Machine
from xray.recipes.recipe import load_recipe, stage_from_recipe
from xray.recipes.run import make_llm
from xray.recipes.step_blocks import blocks
from xray.recipes.survey import Found, Survey

ONE_GPU = Machine(16, 1, "h100", 3e14)
NODE = Machine(128, 8, "h100", 2.4e15)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of pictures without captions, tags and classes."""
    folder = tmp_path_factory.mktemp("pixels")
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(photo(number, (60, 40)))
    return folder


# rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "machine", "pretrained", "base", "stages"),
    [
        ([found(**CAPTIONED)], LAPTOP, "", "small", ["text", "clip"]),
        ([found(captioned=1.0, captions=1.0)], LAPTOP, "", "small", ["clip"]),
        (
            [found(captioned=0.4, captions=2.0)],
            *(LAPTOP, "", "small", ["mae", "hashtag", "text", "clip"]),
        ),
        (
            [found(**CAPTIONED), found("clips", modality="video", tagged=1.0)],
            *(LAPTOP, "", "small", ["mae", "hashtag", "text", "clip"]),
        ),
        ([found(labelled=1.0, label="label_name")], LAPTOP, "", "small", ["mae", "hashtag"]),
        ([found(tagged=0.5)], LAPTOP, "", "small", ["mae", "hashtag"]),
        ([found()], LAPTOP, "", "small", ["mae"]),
        ([found(**CAPTIONED)], LAPTOP, "vit_small_patch16_224", "adapt", ["text", "clip"]),
        ([found(tagged=1.0)], ONE_GPU, "vit_small_patch16_224", "adapt", ["hashtag"]),
        ([found(samples=200_000, **CAPTIONED)], LAPTOP, "", "small", None),
        ([found(samples=200_000, **CAPTIONED)], ONE_GPU, "", "one_gpu", ["mae", "hashtag", "clip"]),
        ([found(samples=9_000_000, **CAPTIONED)], ONE_GPU, "", "one_gpu", None),
        (
            [found(samples=9_000_000, **CAPTIONED)],
            *(NODE, "", "one_node", ["mae", "hashtag", "text", "clip"]),
        ),
    ],
)  # fmt: skip
def test_the_data_and_the_machine_choose_base_and_stages(
    sources: list[Found], machine: Machine, pretrained: str, base: str, stages: list[str] | None
) -> None:
    seen = Survey("data", sources, [])
    scale = scales_for(seen, machine, pretrained)[0]
    made = draft(scale, seen, machine, pretrained)
    assert made.settings["base"] == base
    assert stages is None or made.stages == stages


def test_each_stage_reads_only_the_sources_that_it_can_learn_from() -> None:
    clips = found("clips", modality="video", samples=100, tagged=1.0)
    seen = Survey("data", [found(**CAPTIONED), clips], [])
    settings = draft(scales_for(seen, LAPTOP, "")[0], seen, LAPTOP).settings
    assert [block["source"] for block in settings["data"]["blocks"]] == ["images", "clips"]
    assert [block["source"] for block in settings["clip"]["data"]["blocks"]] == ["images"]
    assert "data" not in settings.get("hashtag", {})  # the words of captions, and tags
    assert settings["data"]["sources"]["clips"]["tags"] == "hashtags"


@pytest.mark.parametrize(
    ("sources", "readers"),
    [
        ([found(captioned=0.1, captions=1.0, tagged=0.8)], ["images_tags"]),
        ([found(captioned=1.0, captions=1.0), found("t", samples=90_000, tagged=1.0)], ["t_tags"]),
        ([found(captioned=0.3, captions=1.0, tagged=1.0)], []),  # many captions
        ([found(captioned=0.1, captions=1.0)], []),  # no hashtags
        ([found(tagged=1.0)], []),  # no captions: no clip stage
    ],
)  # fmt: skip
def test_with_few_captions_clip_reads_hashtags_as_texts(
    sources: list[Found], readers: list[str]
) -> None:
    seen = Survey("data", sources, [])
    made = draft(scales_for(seen, LAPTOP, "")[0], seen, LAPTOP)
    declared, clip = made.settings["data"]["sources"], made.settings.get("clip", {})
    named = {own.name: own for own in sources}
    assert [name for name in declared if name not in named] == readers
    for name in readers:
        own = named[name.removesuffix("_tags")]
        assert declared[name] == {
            "shards": own.shards, "modality": "image",
            "captions": {"joined(hashtags)": 1}, "keep": "captioned",
        }  # fmt: skip
        (captions, tags) = clip["data"]["blocks"]
        assert 32 <= captions["samples"] <= tags["samples"] <= 36 and tags["source"] == name
        assert made.sizes[name] == own.tagged * own.samples
    assert all(block["source"] in named for block in made.settings["data"]["blocks"])


def test_a_language_model_is_made_taken_or_asked_for() -> None:
    few, many = found(**CAPTIONED), found(samples=200_000, **CAPTIONED)
    for own, machine, given, llm, prepared in (
        (few, LAPTOP, "", "${out}/llm", True),
        (few, LAPTOP, "/models/minilm", "/models/minilm", False),
        (many, ONE_GPU, "", "???", False),
    ):
        seen = Survey("data", [own], [])
        made = draft(scales_for(seen, machine, "")[0], seen, machine, text_llm=given)
        assert made.settings["text"]["llm"] == llm and ("prepare" in made.settings) == prepared
        assert ("text" in made.stages) == prepared  # a sentence encoder needs no text stage


@pytest.mark.parametrize(
    ("images", "clips", "most", "devices", "expected"),
    [
        (6090, 323, 72, 1, [64, 8]),
        (6090, 0, 72, 1, [72]),
        (100, 0, 72, 1, [32]),  # enough to contrast them
        (5, 0, 72, 1, [5]),
        (6090, 23, 72, 1, [64, 8]),
        (0, 323, 72, 1, [32]),
        (9_000_000, 900_000, 4096, 8, [3640, 448]),
    ],
)
def test_a_step_is_divided_over_the_sources(
    images: int, clips: int, most: int, devices: int, expected: list[int]
) -> None:
    sources = [found(samples=images)] * bool(images)
    sources += [found("clips", modality="video", samples=clips)] * bool(clips)
    made = [block["samples"] for block in blocks(sources, most, devices)]
    assert made == expected and all(samples % devices == 0 for samples in made)


def test_the_time_is_divided_over_the_stages() -> None:
    each = {"mae": 10.0, "hashtag": 10.0, "text": 10.0, "clip": 10.0}
    epochs = _divided(LENGTHS, each, 900.0)
    assert sum(each[stage] * epochs[stage] for stage in each) == pytest.approx(900)
    assert epochs["clip"] == pytest.approx(6 * epochs["mae"])
    assert _divided(LENGTHS, each, 1.0) == {"mae": 1, "hashtag": 1, "text": 1, "clip": 2}
    long = _divided(LENGTHS, each, 1e9)  # more time than is useful
    assert long == {stage: length.most for stage, length in LENGTHS.items()}


def test_stages_that_read_captions_leave_out_samples_without(tmp_path: Path) -> None:
    own = found(captioned=0.4, captions=2.0)
    made = draft(
        scales_for(Survey("/d", [own], []), LAPTOP, "")[-1], Survey("/d", [own], []), LAPTOP
    )
    kept = {
        stage: made.settings.get(stage, {}).get("data", {}).get("sources") for stage in made.stages
    }
    only = {own.name: {"keep": "captioned"}}
    assert kept == {"mae": None, "hashtag": None, "text": only, "clip": only}
    assert made.kept["clip"] == {own.name: 0.4 * own.samples}


def test_a_language_model_is_built_from_the_captions_there_are(
    pixels: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="has no captions to build an LLM from"):
        make_llm(LlmConfig(str(tmp_path / "none"), str(pixels), 300, 32, 2, 2), "")
    (tmp_path / "a.jpg").write_bytes(photo(0, (60, 40)))
    (tmp_path / "b.jpg").write_bytes(photo(1, (60, 40)))
    (tmp_path / "b.txt").write_text("a dog and a ball")
    make_llm(LlmConfig(str(tmp_path / "llm"), str(tmp_path), 300, 32, 2, 2), "")
    assert (tmp_path / "llm" / "config.json").is_file()


# command ----------------------------------------------------------------------------------------


def test_paths_in_printed_commands_are_quoted(tmp_path: Path) -> None:
    scale: Any = None
    lines = _next(Path("my own.yaml"), Draft(scale, {}), Machine(8, 0, "", 1e12))
    assert [line.strip() for line in lines] == [
        "xray run 'my own.yaml' --plan",
        "xray run 'my own.yaml'",
    ]
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").touch()
    with pytest.raises(ArtifactError, match=f"xray export '{run}'@last"):
        find_manifest(str(run))


def test_the_recipe_runs_as_it_is(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("init", "mine.yaml", demo / "photos", "--hours", "0.01")
    assert done.exit_code == 0, done.stderr
    assert "96 pictures, 32 px on the shorter side" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "xray run mine.yaml"
    text = (tmp_path / "mine.yaml").read_text()
    settings = yaml.safe_load(text)
    assert settings["base"] == "small" and settings["data"]["root"] == str(demo / "photos")
    assert text.count("#") > 12 and "epochs" in settings["clip"]["train"]
    plan = invoke("run", "mine.yaml", "--plan")
    assert plan.exit_code == 0 and "epochs" in plan.stdout, plan.stderr
    run = invoke("run", "mine.yaml", "clip.train.epochs=1")
    assert run.exit_code == 0, run.stderr
    assert (tmp_path / "runs" / "mine" / "clip" / "artifact" / "manifest.json").is_file()
    again = invoke("init", "mine.yaml", demo)
    assert again.exit_code == 2 and "mine.yaml exists already" in again.stderr
    assert (tmp_path / "mine.yaml").read_text() == text


def test_pictures_alone_need_no_language_model(pixels: Path, tmp_path: Path) -> None:
    done = invoke("init", tmp_path / "mine.yaml", pixels, "--hours", "0.01")
    assert done.exit_code == 0, done.stderr
    assert [run.stage for run in load_recipe(str(tmp_path / "mine.yaml")).runs] == ["mae"]
    with pytest.raises(ConfigError, match=r"^text\.llm is not set"):
        load_recipe(str(tmp_path / "mine.yaml"), ["stages=[mae,clip]"])


def test_a_recipe_for_a_gpu_asks_for_a_language_model(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    given = "--gpus", "1", "--gpu", "l4", "--hours", "1", "--pretrained", "vit_tiny_patch16_224"
    done = invoke("init", path, demo, *given, "--text-llm", demo / "llm")
    assert done.exit_code == 0, done.stderr
    (clip,) = load_recipe(str(path)).runs
    assert clip.model.pretrained == "timm" and clip.data.mean is None
    assert clip.train.epochs == 20 and clip.train.precision == "bf16"
    assert "1 x l4; assumed to reach 30% of the peak" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mine.txt", "data"), "must end in .yaml"),
        (("mine.yaml", "/nowhere"), "/nowhere does not exist"),
        (("mine.yaml", "DEMO", "--gpu", "h1000"), "--gpu h1000 is not known"),
        (("mine.yaml", "DEMO", "--gpus", "2"), "set --gpu"),
        (("mine.yaml", "PIXELS", "--pretrained", "vit_tiny_patch16_224"), "leave out --pretrained"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, ...], words: str, demo: Path, pixels: Path, tmp_path: Path
) -> None:
    name, data, *rest = arguments
    data = {"DEMO": str(demo / "photos"), "PIXELS": str(pixels)}.get(data, data)
    done = invoke("init", tmp_path / name, data, *rest)
    assert done.exit_code == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_pictures_without_captions_need_no_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(16):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(photo(number, (60, 40)))
    wrote = invoke("init", "mine.yaml", "photos", "--hours", "0.02")
    assert wrote.exit_code == 0, wrote.stderr
    stages = [run.stage for run in load_recipe("mine.yaml").runs]
    assert stages == ["mae", "hashtag"]
    assert load_recipe("small", ["data.root=photos", "stages=[mae]"]).runs
    with pytest.raises(ConfigError, match=r"^text\.llm is not set"):
        load_recipe("small", ["data.root=photos", "stages=[clip]"])
    for given in (["text.llm=encoder"], ["text.llm=encoder", "train.samples=8", "model=vit_s16"]):
        _, recipe = stage_from_recipe("clip", "small", ["data.root=photos", *given])
        assert recipe.runs[0].text.llm == "encoder"  # type: ignore[attr-defined]
        assert recipe.runs[0].train.samples == 64_000  # of the stage, which sets it itself
