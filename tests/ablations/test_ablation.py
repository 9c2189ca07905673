"""Tests of `xray ablate`: a run from start to end, its results, and errors in ablation files."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ablation_files import FILE, load, write
from child_process import RECIPE, clean_environment
from in_process import invoke
from safetensors.torch import load_file
from shards import write_tar

from xray.ablations.comparison import Outcome, check_metrics, chosen_metrics, compare
from xray.ablations.older import mixed_defaults
from xray.ablations.report import Page
from xray.ablations.trials import Trial, load_ablation, samples_of, stage_runs
from xray.config import loading as cfg
from xray.config.identity import identity
from xray.errors import ConfigError
from xray.recipes.recipe import read_recipe, recipe_layers


def one_thread(*command: str) -> subprocess.CompletedProcess[str]:
    """Run xray with one thread, because sums over several threads differ in the last bits."""
    return subprocess.run(
        [sys.executable, "-m", "xray", *command],
        capture_output=True,
        text=True,
        env=clean_environment(OMP_NUM_THREADS="1"),
    )


def arguments(folder: Path, demo: Path) -> list[str]:
    file = write(folder / "tiny.yaml")
    return ["ablate", file, f"data.root={demo}", f"out={folder / 'out'}", "jobs=2"]


# end to end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two arms with two seeds, kill all processes during training, and run it again."""
    folder = tmp_path_factory.mktemp("ablation")
    command = [sys.executable, "-m", "xray", *arguments(folder, demo)]
    with (folder / "log").open("wb") as log:
        env = clean_environment(OMP_NUM_THREADS="1")
        running = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    while not list(folder.glob("out/stages/mae-*/checkpoints/step_*/COMPLETE")):
        assert running.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not list(folder.glob("out/runs/*/*/done.json"))
    again = one_thread(*arguments(folder, demo))
    assert again.returncode == 0, again.stderr
    assert "Difference to all_tokens" in again.stdout
    logs = [path.read_text() for path in folder.glob("out/runs/*/*/log.txt")]
    assert any("continues from" in log or "is finished" in log for log in logs)
    return folder / "out"


def test_shared_parents_are_trained_once(done: Path) -> None:
    stages = sorted(path.name.split("-")[0] for path in (done / "stages").iterdir())
    assert stages == ["clip"] * 4 + ["mae"] * 2  # per seed: one mae, and two clips that share it
    manifests = [
        json.loads((path / "artifact" / "manifest.json").read_text())
        for path in (done / "stages").glob("clip-*")
    ]
    parents = [manifest["parents"]["vision"]["manifest"] for manifest in manifests]
    assert sorted(map(parents.count, parents)) == [2, 2, 2, 2]
    for folder in (done / "stages").glob("mae-*"):  # every step ran once, over both processes
        rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
        assert rows == list(range(1, 7))


def test_arm_equals_a_separate_run_of_its_recipe(demo: Path, done: Path, tmp_path: Path) -> None:
    settings = ["clip.model.keep_rate=0.5", "seed=1", "stages=[mae,clip]"]
    settings += ["eval.zero_shot.shards=''", f"data.root={demo}", f"out={tmp_path}"]
    alone = one_thread("run", RECIPE, *settings)
    assert alone.returncode == 0, alone.stderr
    recipe = cfg.read_yaml(done / "runs" / "half" / "seed_1" / "recipe.yaml")
    for stage in ("mae", "clip"):
        files = sorted((tmp_path / stage / "artifact").glob("*.safetensors"))
        assert files
        for file in files:
            one = load_file(file)
            two = load_file(Path(recipe[stage]["out"]) / "artifact" / file.name)
            assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    results = (done / "runs" / "half" / "seed_1" / "results.json").read_text()
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(results)


def test_tables_show_the_results_of_the_runs(done: Path) -> None:
    metric = "retrieval.text_to_image_R@5"
    values = {
        arm: [
            json.loads((done / "runs" / arm / f"seed_{seed}" / "results.json").read_text())[
                "retrieval"
            ]["text_to_image_R@5"]
            for seed in (0, 1)
        ]
        for arm in ("all_tokens", "half")
    }
    facts = json.loads((done / "ablation.json").read_text())
    for arm, results in values.items():
        cell = facts["arms"][arm]["metrics"][metric]
        assert cell["n"] == 2 and cell["mean"] == pytest.approx(statistics.mean(results))
        assert cell["std"] == pytest.approx(statistics.stdev(results))
    differences = [b - a for a, b in zip(*values.values(), strict=True)]
    cell = facts["arms"]["half"]["metrics"][metric]
    assert cell["difference"] == pytest.approx(statistics.mean(differences))
    d = statistics.stdev(differences)
    if d > 0:  # Student's t-distribution with one degree of freedom is the Cauchy distribution
        t = statistics.mean(differences) / (d / math.sqrt(2))
        assert cell["p"] == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)))
    else:
        assert cell["p"] == (None if any(differences) else 1.0)
    assert cell["pairs"] == 2
    with (done / "table.csv").open() as file:
        rows = {(row["arm"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(rows["half", metric]["mean"]) == pytest.approx(statistics.mean(values["half"]))
    centre, spread = (100 * f(values["half"]) for f in (statistics.mean, statistics.stdev))
    shown = f"{centre:.1f} ± {spread:.1f}"
    page = (done / "report.html").read_text()
    assert shown in page and "http" not in page
    lines = (done / "tables.md").read_text().splitlines()
    assert any(line.startswith("| half | 2 | ") and f" {shown} |" in line for line in lines)
    assert "**Difference to " in "".join(lines) and lines[-1].startswith("± is the standard")


def test_report_of_a_run_has_only_its_sections(done: Path) -> None:
    page = (done / "runs" / "half" / "seed_0" / "report.html").read_text()
    assert "Images retrieved for captions" in page and "MAE reconstructions" in page
    assert "Zero-shot classes" not in page and "Most probable tags" not in page  # not evaluated


def test_cost_of_a_run_is_the_sum_over_its_stages(done: Path) -> None:
    facts = json.loads((done / "ablation.json").read_text())
    for run in facts["runs"]:
        assert run["samples_mae"] == run["samples_clip"] == 72
        assert run["pictures_and_clips"] == 144 and run["seconds"] > 0
    full, half = (facts["arms"][arm]["flops"] for arm in ("all_tokens", "half"))
    assert 0 < half < full
    stages = json.loads((done / "flops.json").read_text())
    assert full == sum(stages[name] for name in facts["arms"]["all_tokens"]["stages"].values())


def test_second_run_trains_nothing_and_reports_a_failed_arm(demo: Path, done: Path) -> None:
    """Only the third arm fails, on broken pictures; finished trials stay unchanged."""
    before = {p: p.stat().st_mtime_ns for p in done.glob("stages/*/artifact/manifest.json")}
    plain = done.parent / "plain" / "0.tar"
    plain.parent.mkdir()
    write_tar(plain, {f"{i}.{end}": b"no jpeg" for i in range(2) for end in ("jpg", "txt")})
    broken = ["arms.broken.clip.model.keep_rate=1.0", f"arms.broken.eval.retrieval.shards={plain}"]
    again = one_thread(*arguments(done.parent, demo), *broken, "seeds=[0]")
    assert again.returncode == 1
    assert "broken, seed 0 failed with exit code 2: xray:" in again.stderr
    assert "all_tokens, seed 0" not in again.stderr  # finished, so it does not run again
    assert before == {p: p.stat().st_mtime_ns for p in done.glob("stages/*/artifact/manifest.json")}
    facts = json.loads((done / "ablation.json").read_text())
    assert [failed["arm"] for failed in facts["failed"]] == ["broken"]
    assert facts["arms"]["half"]["metrics"] and not facts["arms"]["broken"]["metrics"]
    assert facts["arms"]["half"]["metrics"]["clip.photos/loss"]["p"] is None  # one seed


# ablation files -----------------------------------------------------------------------------------


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


def test_unknown_ablation_and_unknown_metric(demo: Path, done: Path) -> None:
    unknown = invoke("ablate", "losess")
    assert unknown.exit_code == 2 and "did you mean 'losses'" in unknown.stderr
    again = invoke(*arguments(done.parent, demo), "metrics=[retrieval.text_to_image_R@55]")
    assert again.exit_code == 2 and "did you mean 'retrieval.text_to_image_R@5'" in again.stderr


# results ------------------------------------------------------------------------------------------


def test_metric_of_a_failed_run_does_not_hide_the_others(tmp_path: Path) -> None:
    text = f"base: {RECIPE}\nseeds: [0]\nmetrics: [hashtag.loss, clip.loss]\narms: {{a: {{}}}}"
    ablation = load(tmp_path, text, f"out={tmp_path}")
    outcome = Outcome("a", 0, {"clip.loss": 2.0}, {}, {})
    assert chosen_metrics(ablation, [outcome]) == ["clip.loss"]
    with pytest.raises(ConfigError, match=r"no run has hashtag\.loss; hashtag has none"):
        check_metrics(ablation, [outcome])


def test_median_rank_is_not_shown_as_a_percentage(tmp_path: Path) -> None:
    ablation = load(tmp_path, f"base: {RECIPE}\nseeds: [0]\narms: {{a: {{}}}}", f"out={tmp_path}")
    rank = "retrieval.text_to_image_median_rank"
    values = {rank: 3.5, "retrieval.chance_text_to_image_median_rank": 60.0}
    outcomes = [Outcome("a", 0, values, {}, {})]
    metrics = chosen_metrics(ablation, outcomes)
    cells = compare(ablation, outcomes, metrics)
    table = Page(ablation, outcomes, metrics, cells, {rank: 60.0}, {}).results()
    assert metrics == [rank] and "%" not in table.columns[2]
    assert table.rows == [("a", "1", "3.5"), ("chance", "", "60")]


def test_arms_may_be_given_in_epochs(demo: Path, tmp_path: Path) -> None:
    common = 'common: {stages: [mae, clip], clip.train.epochs: 2, eval.zero_shot.shards: ""}'
    arms = "arms:\n  a: {}\n  b: {clip.train.epochs: 0.5}\n"
    text = f"base: {RECIPE}\nseeds: [0]\n{common}\n{arms}"
    ablation = load(tmp_path, text, f"data.root={demo}")
    assert [samples_of(trial.recipe.runs[-1]) for trial in ablation.trials] == [288, 72]
