"""`train.epochs`: resolved from the data, recorded as samples; advice on odd lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from child_process import RECIPE, xray
from in_process import invoke
from tiny import settings, train

from stages.mae import MaeStage
from xray.config import loading as cfg
from xray.errors import ConfigError
from xray.recipes.machine import Machine
from xray.recipes.plan_table import plan_notes, plan_table, plan_time
from xray.recipes.recipe import load_recipe
from xray.recipes.run import sizes_at_hand

SIZES = {"photos": 96, "clips": 24}  # of the demo data; a step has 8 photos and 4 clips


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.epochs=1"], 12),  # a pass over the photos takes 12 steps, over the clips 6
        (["train.epochs=1.5"], 18),
        (["train.epochs=0.01"], 1),
        (["train.epochs=1", "data.blocks=[{source: clips, samples: 5}]"], 5),  # 4.8 rounded up
        (["train.epochs=1", "data.views=2"], 24),  # a step reads half as many samples
        (["train.epochs=1", "data.modalities=[video]"], 6),
    ],
)
def test_an_epoch_is_a_pass_over_the_source_that_takes_the_most_steps(
    overrides: list[str], steps: int, demo: Path, tmp_path: Path
) -> None:
    config = settings("mae", demo, tmp_path, *overrides)
    resolved = config.with_length(SIZES)
    assert resolved.steps == steps and resolved.train.epochs is None
    assert resolved.train.samples == steps * config.global_batch


def test_without_the_data_the_length_is_not_known(demo: Path, tmp_path: Path) -> None:
    config = settings("mae", demo, tmp_path, "train.epochs=2")
    assert config.with_length({"photos": 96}) is config  # the clips are missing
    with pytest.raises(ConfigError, match=r"train\.epochs=2 follows from the data.*data\.root"):
        _ = config.steps


def test_the_length_of_a_later_layer_wins(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {RECIPE}\nmae: {{train: {{epochs: 3}}}}\n")
    given = [f"data.root={tmp_path}", "stages=[mae,hashtag]"]
    mae, hashtag = (run.train for run in load_recipe(str(mine), given).runs)
    assert (mae.samples, mae.epochs) == (0, 3) and (hashtag.samples, hashtag.epochs) == (72, None)
    mae, hashtag = (run.train for run in load_recipe(str(mine), [*given, "train.epochs=5"]).runs)
    assert (mae.epochs, hashtag.epochs) == (5, 5) and not mae.samples + hashtag.samples
    mae, _ = (run.train for run in load_recipe(str(mine), [*given, "mae.train.samples=9"]).runs)
    assert (mae.samples, mae.epochs) == (9, None)


def test_both_lengths_are_an_error_that_names_both_keys(tmp_path: Path) -> None:
    both = ["mae.train.samples=9", "mae.train.epochs=2"]
    with pytest.raises(ConfigError, match=r"mae\.train\.samples and mae\.train\.epochs"):
        cfg.parse_overrides(both)
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {RECIPE}\ntrain: {{samples: 9, epochs: 2}}\n")
    with pytest.raises(ConfigError, match=r"train\.samples=9 and train\.epochs=2 both"):
        load_recipe(str(mine), [f"data.root={tmp_path}"])


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf"])
def test_epochs_must_be_above_0(value: str, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs=.*above 0"):
        settings("mae", demo, tmp_path, f"train.epochs={value}")


def test_a_run_records_samples_and_resumes(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "mae"
    artifact = train("mae", demo, out, "train.epochs=0.25")
    assert artifact.manifest["samples"] == artifact.manifest["config"]["train"]["samples"] == 36
    record = json.loads((out / "run.json").read_text())["config"]["train"]
    assert record["samples"] == 36 and "epochs" not in record
    again = train("mae", demo, out, "train.epochs=0.25")
    assert again.digest == artifact.digest
    assert train("mae", demo, out, "train.samples=36").digest == artifact.digest
    resumed = invoke("train", "mae", "--resume", out)  # from its config.yaml
    assert resumed.exit_code == 0, resumed.stderr
    with pytest.raises(ConfigError, match=r"another run: config\.train\.samples: 36 -> 72"):
        train("mae", demo, out, "train.epochs=0.5")


def test_an_interrupted_run_continues_to_the_same_end(demo: Path, tmp_path: Path) -> None:
    more = "stages=[mae]", f"data.root={demo}", "mae.train.epochs=0.5", f"out={tmp_path}"
    assert xray("run", RECIPE, *more, killed_at="step:3").returncode != 0
    assert "continues" in invoke("run", RECIPE, *more, "--plan").stdout
    moved = invoke("run", RECIPE, *more, f"data.root={tmp_path}", "--plan")
    assert "continues" in moved.stdout  # also without the data
    done = invoke("run", RECIPE, *more)
    assert done.exit_code == 0 and "step 2 of 6" in done.stderr, done.stderr
    manifest = json.loads((tmp_path / "mae" / "artifact" / "manifest.json").read_text())
    assert manifest["samples"] == 72


def test_the_plan_of_a_recipe_shows_samples_steps_and_epochs(demo: Path) -> None:
    recipe = load_recipe(RECIPE, [f"data.root={demo}", "train.epochs=3", "stages=[mae]"])
    table = plan_table(recipe, sizes_at_hand(recipe))
    (row,) = table.rows
    assert row[table.columns.index("length")] == "432 samples\n36 steps\n3 to 6 epochs"
    assert plan_notes(recipe, sizes_at_hand(recipe)) == []
    (row,) = plan_table(recipe, {}).rows
    assert row[table.columns.index("length")] == "3 epochs"


def test_a_key_of_the_text_stage_without_that_stage_is_noted(demo: Path) -> None:
    typed = [f"data.root={demo}", "text.llm=x", "text.max_length=9", "text.train.samples=64"]
    recipe = load_recipe("small", [*typed, "clip.train.samples=9000"])
    (note,) = (note for note in plan_notes(recipe, {}) if "text." in note)
    assert note.startswith("text.max_length=9 does nothing") and "clip.text.max_length" in note
    assert load_recipe(RECIPE, [f"data.root={demo}", "text.max_length=9"]).notes == []


def test_the_plan_of_a_recipe_estimates_its_time(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(RECIPE, [f"data.root={demo}", "train.epochs=3", "stages=[mae,text]"])
    mae, _ = (run.with_length(SIZES) for run in recipe.runs)
    sizes = {run.stage: SIZES for run in recipe.runs}
    forward = 36 * (8 * MaeStage(mae).macs(1) + 4 * MaeStage(mae).macs(4))  # type: ignore[arg-type]
    machine = Machine(2, 0, "", 3 * 2 * forward / 90)
    monkeypatch.setattr("xray.recipes.plan_table.find_machine", lambda *given: machine)
    told = "time: about 90 s (estimated, without texts and evaluation), on 2 CPU cores"
    assert plan_time(recipe, sizes).startswith(told)
    assert plan_time(recipe, {}) == ""  # the samples of the data are not known

    def unknown(*given: object) -> Machine:
        raise ConfigError("the kind of GPU is not known")

    monkeypatch.setattr("xray.recipes.plan_table.find_machine", unknown)
    assert plan_time(recipe, sizes) == ""


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("model.fuse=false", "scratch"),
        ("model.pretrained=timm", "vit_tiny_patch16_224 of timm"),
        ("model.pretrained=/weights/tower.safetensors", "tower.safetensors"),
    ],
)
def test_the_plan_of_a_recipe_shows_where_a_stage_starts(
    given: str, origin: str, demo: Path
) -> None:
    recipe = load_recipe(RECIPE, [f"data.root={demo}", "stages=[mae,text]", given])
    table = plan_table(recipe, {})
    start = table.columns.index("starts from")
    assert [row[start] for row in table.rows] == [origin, "llm"]


@pytest.mark.parametrize(
    ("setting", "note"),
    [
        (
            "mae.train.samples=12",
            "sees only 8% of the 96 samples of photos: set mae.train.epochs=1",
        ),
        ("mae.train.epochs=2000", "at least 2,000 times: set mae.train.epochs=100"),
        (
            "data.blocks=[{source: photos, samples: 1}, {source: clips, samples: 16}]",
            "each of the 24 samples of clips 5,333 times, but photos 83 times: lower its samples "
            "in mae.data.blocks from 16 to about 1",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_named_with_a_setting(
    setting: str, note: str, demo: Path
) -> None:
    given = [f"data.root={demo}", "stages=[mae]", "mae.train.samples=136000", setting]
    given = given[:2] + given[-1:] if "train." in setting else given
    recipe = load_recipe(RECIPE, given)
    (found,) = plan_notes(recipe, sizes_at_hand(recipe))
    assert note in found
    shown = invoke("run", RECIPE, *given, "--plan").stdout
    planned = invoke("plan", RECIPE, *given).stdout
    assert found in shown.splitlines() and found in planned.splitlines()
    advised = note.rpartition(" set ")[2]
    if "=" in advised:  # the advice is valid in the command that prints it, and mends it
        again = invoke("run", RECIPE, *given[:2], advised, "--plan")
        assert again.exit_code == 0 and "mae: sees" not in again.stdout


def test_a_plan_without_data_says_what_is_missing(tmp_path: Path) -> None:
    given = RECIPE, f"data.root={tmp_path}", "stages=[mae]", "mae.train.epochs=2"
    done = invoke("plan", *given, "--json")
    plan = json.loads(done.stdout)
    (row,), (note,) = plan["stages"], plan["notes"]
    assert row["steps"] is row["samples"] is row["hours"] is None and row["memory"]["total"] > 0
    assert "mae.train.epochs=2 follow from the data" in note and "data.root" in note
    table = invoke("plan", *given)
    assert table.exit_code == 0 and "unknown" in table.stdout
    config = invoke("config", *given).stdout
    assert "epochs: 2.0" in config and "# mae: samples becomes the number of 2 epochs" in config
