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
from ablation_files import load, write
from child_process import RECIPE, clean_environment
from in_process import invoke
from safetensors.torch import load_file
from shards import write_tar

from tools.experiments import join_results
from xray import processes
from xray.ablations.comparison import Outcome, check_metrics, chosen_metrics, compare
from xray.ablations.report import Page
from xray.ablations.trials import load_ablation
from xray.commands.common import EXIT_CODES
from xray.config import loading as cfg
from xray.errors import ConfigError, Preempted


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


def test_the_results_of_two_folders_are_joined(
    demo: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder per seed gives the report of both seeds; other settings are refused."""
    facts = json.loads((done / "ablation.json").read_text())
    file, root = str(done.parent / "tiny.yaml"), f"data.root={demo}"
    for seed in (0, 1):
        ablation = load_ablation(file, [root, f"seeds=[{seed}]"])
        arms = {arm: {"stages": ablation.of(arm)[0].keys} for arm in ablation.arms}
        runs = [run for run in facts["runs"] if run["seed"] == seed]
        part = {**facts, "seeds": [seed], "arms": arms, "runs": runs}
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "ablation.json").write_text(json.dumps(part))
    folders = [str(tmp_path / seed) for seed in ("1", "0", "1")]
    command = ["join_results", file, *folders, "--settings", root, f"out={tmp_path / 'joined'}"]
    monkeypatch.setattr(sys, "argv", command)
    join_results.main()
    for name in ("ablation.json", "runs.csv", "table.csv", "tables.md"):
        assert (tmp_path / "joined" / name).read_text() == (done / name).read_text()
    monkeypatch.setattr(sys, "argv", [*command, "arms.half.clip.model.keep_rate=0.7"])
    with pytest.raises(SystemExit, match="1: half has other settings"):
        join_results.main()
    monkeypatch.setattr(sys, "argv", [*command, "seeds=[1]"])  # no run is left out in silence
    with pytest.raises(SystemExit, match="0: tiny has no run of all_tokens, seed 0"):
        join_results.main()


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


def test_an_interrupted_ablation_reports_the_finished_runs(
    demo: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third seed is added, and a signal stops its first run."""

    def signalled(command: list[str], **more: Any) -> Any:
        process = start(["sleep", "10000"], **more)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    start = processes.start
    monkeypatch.setattr(processes, "start", signalled)
    (done / "ablation.json").unlink()
    stopped = invoke(*arguments(done.parent, demo), "seeds=[0,1,2]")
    assert stopped.exit_code == EXIT_CODES[Preempted]
    assert stopped.stdout.endswith(f"report of the finished runs: {done / 'report.html'}\n")
    facts = json.loads((done / "ablation.json").read_text())
    assert {(run["arm"], run["seed"]) for run in facts["runs"]} == {
        (arm, seed) for arm in ("all_tokens", "half") for seed in (0, 1)
    }


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
    table = Page(ablation, outcomes, metrics, cells, {rank: [60.0]}, {}).results()
    assert metrics == [rank] and "%" not in table.columns[2]
    assert table.rows == [("a", "1", "3.5"), ("chance", "", "60")]


def test_a_chance_level_that_differs_between_arms_is_not_shown(tmp_path: Path) -> None:
    """Random tokens keep more of an object than merged ones do: a mean would be that of no arm."""
    arms = "arms: {a: {}, b: {model.reduce: tome}}\nmetrics: [retrieval.x, retrieval.y]"
    ablation = load(tmp_path, f"base: {RECIPE}\nseeds: [0]\n{arms}", f"out={tmp_path}")
    values = {"retrieval.x": 0.5, "retrieval.y": 0.5}
    outcomes = [Outcome(arm, 0, values, {}, {}) for arm in ("a", "b")]
    metrics = ["retrieval.x", "retrieval.y"]
    cells = compare(ablation, outcomes, metrics)
    chance = {"retrieval.x": [0.2, 0.1], "retrieval.y": [0.1, 0.1]}
    flops = {key: 1.0 for trial in ablation.trials for key in trial.keys.values()}
    page = Page(ablation, outcomes, metrics, cells, chance, flops)
    assert page.results().rows[-1] == ("chance", "", "", "10.0")
    assert all(column.endswith("%") for column in page.results().columns[2:])
    assert page.facts([])["chance"] == {"retrieval.y": 0.1}
