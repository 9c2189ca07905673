"""Tests of ablation files: arms, axes, shared settings, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ablation_files import FILE, load, write
from child_process import RECIPE
from in_process import invoke

from xray.ablations.older import mixed_defaults
from xray.ablations.trials import Trial, load_ablation, samples_of, stage_runs
from xray.config import loading as cfg
from xray.config.identity import identity
from xray.recipes.recipe import read_recipe, recipe_layers


def test_axes_give_every_combination_for_each_seed(tmp_path: Path) -> None:
    text = f"base: {RECIPE}\nseeds: [3, 4]\naxes: {{clip.loss: [info_nce, sigmoid], mae.loss: [1]}}"
    with pytest.raises(Exception, match=r"arm clip\.loss=info_nce,mae\.loss=1: unknown"):
        load(tmp_path, text)
    text = text.replace("mae.loss: [1]", "clip.model.keep_rate: [1.0, 0.5]")
    ablation = load(tmp_path, text, "hashtag.train.samples=24")
    assert list(ablation.arms) == [
        f"loss={loss},keep_rate={rate}" for loss in ("info_nce", "sigmoid") for rate in (1.0, 0.5)
    ]
    assert len(ablation.trials) == 8 and {trial.seed for trial in ablation.trials} == {3, 4}
    for trial in ablation.trials:
        assert {run.seed for run in trial.recipe.runs} == {trial.seed}
        assert trial.recipe.runs[1].train.samples == 24
    uses = stage_runs(ablation)
    assert sorted(map(len, uses.values())) == [1] * 8 + [4] * 6  # mae, hashtag, text
    clip = ablation.trials[3].recipe.runs[-1]
    assert (clip.clip.loss, clip.model.keep_rate) == ("sigmoid", 0.5)


def test_arm_overrides_command_line_and_command_line_overrides_common(tmp_path: Path) -> None:
    text = (
        f"base: {RECIPE}\ncommon: {{train.samples: 48, clip.train.samples: 60}}\n"
        "arms: {a: {}, b: {clip.train.samples: 36}, c: {train.samples: 24}}"
    )
    trials = load(tmp_path, text, "mae.train.samples=12", "seeds=[0]").trials
    samples = {t.arm: [run.train.samples for run in t.recipe.runs] for t in trials}
    assert samples == {"a": [12, 48, 48, 60], "b": [12, 48, 48, 36], "c": [24, 24, 24, 24]}


def test_match_samples_equalises_the_samples_of_two_arms(tmp_path: Path) -> None:
    text = f"""
base: {RECIPE}
arms:
  full: {{mae.train.samples: 120}}
  alone: {{stages: [text, clip], match_samples: full}}
"""
    runs_by_arm = {trial.arm: trial.recipe.runs for trial in load(tmp_path, text).trials}
    samples = {
        arm: sum(samples_of(run) for run in runs if run.stage != "text")
        for arm, runs in runs_by_arm.items()
    }
    assert samples == {"full": 120 + 72 + 72, "alone": 264}


def test_a_mean_that_is_left_to_the_weights_is_not_a_given_one(tmp_path: Path) -> None:
    text = FILE.replace("arms:", "arms:\n  imagenet: {data: {mean: [0.485, 0.456, 0.406]}}")
    for weights, folders in (("", 2), ("model.pretrained=timm", 4)):
        ablation = load(tmp_path, text, *([weights] if weights else []))
        mae = [name for name in stage_runs(ablation) if name.startswith("mae-")]
        assert len(mae) == folders  # of two seeds


def test_runs_added_to_an_older_folder_take_its_defaults(tmp_path: Path) -> None:
    """Records of before a key existed lack it; those of today have what the run decided."""
    before = load(tmp_path, FILE, f"out={tmp_path / 'out'}")
    first, other, second = before.trials[:3]
    today: dict[str, dict[str, Any]] = {
        "model": {"sincos": "columns"},
        "data": {"resize": "crop"},
        "text": {"pool_prompt": False, "pool_special": False},
    }
    for decided in (today, {}):
        for run in first.recipe.runs:
            record = cfg.merge(identity(run), {k: v for k, v in decided.items() if hasattr(run, k)})
            Path(run.out).mkdir(parents=True, exist_ok=True)
            (Path(run.out) / "run.json").write_text(json.dumps({"config": record}))
        after = load(tmp_path, FILE, f"out={tmp_path / 'out'}")
        assert [trial.keys for trial in after.trials] == [trial.keys for trial in before.trials]
        assert after.trials[0].layer == first.layer
        if decided:
            assert after.trials[1].layer == other.layer
    older = {"model": {"sincos": "rows"}, "data": {"resize": "crop"}}
    texts = {"text": {"pool_prompt": False, "pool_special": True}}
    added, seed = after.trials[1:3]
    assert added.layer == cfg.merge(other.layer, {"clip": older | texts})
    assert seed.layer == cfg.merge(second.layer, {"mae": older, "clip": older | texts})
    resolved = read_recipe([*recipe_layers(RECIPE, None), *before.common, seed.layer])
    assert [identity(run) for run in resolved.runs] == [identity(run) for run in seed.recipe.runs]


def test_runs_of_several_defaults_in_one_folder_are_named(tmp_path: Path) -> None:
    """An earlier version may have added runs with its own defaults to a folder of older ones."""
    trials = load(tmp_path, FILE, f"out={tmp_path / 'out'}").trials
    first, second = (trial.recipe.runs[0] for trial in trials[::2])  # mae, of two seeds

    def add(run: Any, **decided: Any) -> list[str]:
        record = cfg.merge(identity(run), decided)
        Path(run.out).mkdir(parents=True, exist_ok=True)
        (Path(run.out) / "run.json").write_text(json.dumps({"config": record}))
        return mixed_defaults(load(tmp_path, FILE, f"out={tmp_path / 'out'}"))

    names = [Path(run.out).name for run in (first, second)]
    assert add(first) == []
    assert add(second, model={"sincos": "rows"}, data={"resize": "crop"}) == []
    for given in ({"interpolation": "bilinear"}, {"mean": [0.5] * 3}):  # decided by the weights
        assert add(second, model={"sincos": "rows"}, data={"resize": "crop", **given}) == []
    (line,) = add(second, model={"sincos": "columns"}, data={"resize": "crop"})
    assert f"model.sincos is rows in {names[0]}, columns in {names[1]}" in line
    assert len(add(second, model={"sincos": "columns"}, data={"resize": "whole"})) == 2
    assert add(first, model={"sincos": "columns"}, data={"resize": "whole"}) == []
    text = FILE.replace("common: {", "common: {data.resize: crop, ")
    for run in [t.recipe.runs[0] for t in load(tmp_path, text, f"out={tmp_path / 'out'}").trials]:
        add(run)
    assert mixed_defaults(load(tmp_path, text, f"out={tmp_path / 'out'}")) == []


def test_arms_share_a_prepared_llm_only_if_its_settings_are_equal(tmp_path: Path) -> None:
    text = """
base: quickstart
arms:
  decoder: {}
  same: {clip.loss: sigmoid}
  classic: {prepare.llm.family: clip, clip.text: {attention: causal, pooling: last}}
"""
    runs = {t.arm: t.recipe for t in load(tmp_path, text, "seeds=[0]").trials}
    paths = {arm: recipe.prepare.llm.path for arm, recipe in runs.items() if recipe.prepare.llm}
    assert paths["decoder"] == paths["same"] != paths["classic"]
    for arm, recipe in runs.items():
        assert {run.text.llm for run in recipe.runs if run.stage in ("text", "clip")} == {
            paths[arm]
        }
    texts = {arm: recipe.runs[2].out for arm, recipe in runs.items()}
    assert texts["decoder"] == texts["same"] != texts["classic"]


@pytest.mark.parametrize(
    ("name", "base"),
    [("stages", "real_small"), *((name, "quickstart") for name in cfg.shipped("ablation"))],
)
def test_shipped_ablations(name: str, base: str) -> None:
    more = ["arms.curated.data.sources.photos.keep=kept-1"] if name == "curation" else []
    ablation = load_ablation(name, [f"base={base}", "data.root=somewhere", *more])
    assert len(ablation.arms) >= 3 and len(ablation.config.seeds) >= 3
    assert str(ablation.out) == f"runs/ablate_{name}_{base}"
    comment = cfg.config_path(f"ablation/{name}").read_text().split("\nbase:")[0]
    assert f"xray ablate {name}" in comment and all(x.startswith("#") for x in comment.splitlines())
    first: list[Trial] = ablation.trials[: len(ablation.arms)]
    assert len({trial.key for trial in first}) == len(first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {a: {}}", "base is not set"),
        ("base: R", "has no arms: set arms or axes"),
        ("base: R\narms: {}", "has no arms"),
        ("base: R\naxis: {}", "unknown key 'axis'; did you mean 'axes'"),
        ("base: quickstrat\narms: {a: {}}", "did you mean 'quickstart'"),
        ("base: R\narms: {a: {clip.los: sigmoid}}", "arm a: unknown key"),
        ("base: R\narms: {a: {clip.los: sigmoid}}", "did you mean 'clip.loss'"),
        ("base: R\naxes: {clip.lss: [sigmoid]}", "did you mean 'clip.loss'"),
        ("base: R\naxes: {modle.keep_rate: [1.0]}", "did you mean 'model'"),
        ("base: R\naxes: {clip.loss: sigmoid}", "axes.clip.loss=sigmoid must be a list"),
        ("base: R\naxes: {clip.loss: [sigmoid, sigmoid]}", "arm loss=sigmoid twice"),
        (
            "base: R\narms: {a: {}, bb: {}}\nbaseline: b",
            "baseline=b is not an arm; did you mean 'bb'",
        ),
        ("base: R\narms: {a: {}, a: {clip.loss: sigmoid}}", "duplicate key a"),
        ("base: R\narms: {a: {}, b: {clip.loss: info_nce}}", "arms a and b are the same"),
        ("base: R\narms: {a: {}}\nmetrics: [retreival.x]", "did you mean 'retrieval'"),
        ("base: R\narms: {a: {}}\nmetrics: [top1]", "write SUITE.MEASURE or STAGE.METRIC"),
        ("base: R\narms: {a: {seed: 1}}", "arm a: seed cannot be set here: use seeds"),
        ("base: R\narms: {a: {clip.out: x}}", "arm a: clip.out cannot be set here"),
        ("base: R\narms: {a: {match_samples: b}}", "match_samples=b is not another arm"),
        ("base: R\narms: {a: 5}", "arm a must be a section"),
        ("base: R\narms: {a/b: {}}", "arm name 'a/b' must be of letters"),
        (
            "base: R\narms: {a: {clip.text.llm: '???'}}",
            "arms.a.clip.text.llm is not set: add arms.a",
        ),
        ("base: R\narms: {a: {}}\nseeds: [1, 1]", "seeds=[1, 1] must be different"),
        ("base: R\narms: {a: {}}\nseeds: no", "seeds"),
        ("base: R\ncommon: {clp.loss: x}\narms: {a: {}}", "unknown key 'clp'"),
    ],
)
def test_invalid_files_give_one_error_line(text: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", text.replace("base: R", f"base: {RECIPE}"))
    done = invoke("ablate", file, f"data.root={tmp_path}", "--plan")
    assert done.exit_code == 2, done.output
    assert message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_arms_may_be_given_in_epochs(demo: Path, tmp_path: Path) -> None:
    common = 'common: {stages: [mae, clip], clip.train.epochs: 2, eval.zero_shot.shards: ""}'
    arms = "arms:\n  a: {}\n  b: {clip.train.epochs: 0.5}\n"
    text = f"base: {RECIPE}\nseeds: [0]\n{common}\n{arms}"
    ablation = load(tmp_path, text, f"data.root={demo}")
    assert [samples_of(trial.recipe.runs[-1]) for trial in ablation.trials] == [288, 72]
