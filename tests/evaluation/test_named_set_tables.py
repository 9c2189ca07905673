"""Tables, files and pages of eval.sets in `xray eval`, `xray compare` and recipes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import invoke
from named_data import (
    evaluate,
    measures,
    named,
    of_class,
    wds,
)
from shards import photo

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, Tagger
from xray.config import DataConfig
from xray.config.loading import build
from xray.evaluation.comparison import comparison_table
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.set_page import write_page
from xray.evaluation.set_runs import SetResult
from xray.evaluation.set_tables import DATACOMP, canonical, compared_sets, mean_table, summary
from xray.evaluation.suites.retrieval import DIRECTIONS
from xray.evaluation.suites.tagging import TAGS
from xray.evaluation.suites.zero_shot import MAP
from xray.recipes.recipe import Recipe
from xray.recipes.report import write_run_report
from xray.recipes.report_examples import confused, retrieved
from xray.recipes.run import evaluate as evaluate_recipe


def test_means_over_sets_and_the_average_of_datacomp(
    clip: Path, benchmarks: Path, tmp_path: Path
) -> None:
    results = evaluate(clip, benchmarks, tmp_path, "--suite", "zero_shot,retrieval")
    found = measures(results)
    of_top1 = ["folders", "wds_cifar10_test", "wds_mnist"]
    top1 = [found[name]["zero_shot"]["top1"] for name in of_top1]
    mean = results["means"]["zero_shot"]["top1"]
    assert mean == {"mean": pytest.approx(np.mean(top1)), "sets": 3}
    assert not {"top1_low", "samples"} & results["means"]["zero_shot"].keys()
    assert results["means"]["zero_shot"]["mean_average_precision"]["sets"] == 1
    recall = [found["flickr30k"]["retrieval"][f"{way}_R@1"] for way in
              ("text_to_image", "image_to_text")]  # fmt: skip
    known = [*top1[1:], np.mean(recall)]
    assert results["datacomp"] == {"mean": pytest.approx(np.mean(known)), "sets": 3, "of": 38}
    assert "DataComp's average" in results["printed"] and "3 of its 38" in results["printed"]
    assert f"{100 * np.mean(known):.1f}" in results["printed"]
    page = (tmp_path / "results.html").read_text()
    assert page.count("data:image/svg+xml") == 4 and "DataComp&#x27;s average" in page
    assert DATACOMP == 38
    for name in ("wds_vtab-caltech101_test", "vtab/caltech101", "caltech101", "Caltech101"):
        assert canonical(name) == "caltech101"
    assert canonical("wds_imagenet-a") == "imagenet-a"


def robust(clean: float, *shifts: str) -> SetResult:
    """Measures of robustness on one set, and on others from elsewhere."""
    own = {
        "samples": 4.0,
        "attacked_samples": 0.0,
        "chance": 0.5,
        "shift": 0.5,
        "chance_shift": 0.5,
    }
    own |= {"clean": clean, "clean_low": clean - 0.25, "clean_high": clean + 0.25}
    for name in shifts:
        own |= {f"shift/{name}": 0.5, f"shift/chance_{name}": 0.5, f"shift_samples/{name}": 2.0}
        own |= {f"shift_classes/{name}": 2.0, f"shift_left_out/{name}": 0.0}
    return SetResult("", {f"zero_shot/{key}": value for key, value in own.items()})


def test_a_row_that_some_sets_do_not_have_has_no_mean() -> None:
    """The mean over v2 and r, and that over v2 and s, are of different sets."""
    first, second = robust(0.5, "v2", "r"), robust(0.75, "v2", "s")
    rows = mean_table({"": {"a": {"robustness": first}, "b": {"robustness": second}}}).rows
    assert [row[1] for row in rows] == ["zero-shot, clean", "zero-shot, shift v2"]
    assert rows[0][:2] == ("mean of 2 sets", "zero-shot, clean") and "62.5" in rows[0][2]


def tagged(chance: float) -> SetResult:
    """Measures of tags with a model's vocabulary, on which chance depends."""
    own = dict.fromkeys(("samples", "untagged", "vocabulary", "tags", "ece"), 4.0)
    own |= {"precision@1": 0.5, "recall@5": 0.5, "dead_share@10": 0.5, "least_dead@10": 1.0}
    own |= {"chance_precision@1": chance, "chance_recall@5": 0.25}
    return SetResult("", {f"own/{key}": value for key, value in own.items()})


def test_several_models_show_their_own_chance() -> None:
    models = {"a": tagged(0.25), "b": None, "c": tagged(0.125)}
    results = {name: {"x": {"tags": own}} if own else {} for name, own in models.items()}
    measures = {name: {"tags": own.measures} if own else {} for name, own in models.items()}
    for start, table in ((2, compared_sets(results)), (1, comparison_table(measures))):
        chance = {row[start - 1]: row[-1] for row in table.rows}
        assert (
            chance["own precision@1"] == "25.00 / - / 12.50" and chance["own recall@5"] == "25.00"
        )
        assert table.rows[0][start:-1] == ("50.0", "", "50.0")


def by_language(recall: float) -> SetResult:
    """Measures of retrieval on a set with captions in English."""
    own = {"images": 4.0, "texts": 4.0}
    for name in (f"{way}_R@{k}" for way in DIRECTIONS for k in (1, 5, 10)):
        own |= {name: recall, f"{name}_low": recall - 0.25, f"{name}_high": recall + 0.25}
        own[f"chance_{name}"] = 0.25
    return SetResult("", {"languages": 1.0, **own} | {f"en/{key}": own[key] for key in own})


def test_a_mean_has_no_interval(tmp_path: Path) -> None:
    """Ends of intervals are NAME_low/PREFIX, or NAME_low for all of a name."""
    results = {
        name: {"robustness": robust(value), "retrieval": by_language(value)}
        for name, value in {"a": 0.25, "b": 0.5}.items()
    }
    rows = {row[1]: row[2] for row in mean_table({"": results}).rows}
    assert rows["zero-shot, clean"] == rows["text to image R@1, en"] == "37.5"
    assert not any("[" in value for value in rows.values())
    means = summary(results)["means"]
    assert means["robustness"] == {"zero_shot/clean": {"mean": 0.375, "sets": 2}}
    assert "en/text_to_image_R@1" in means["retrieval"]
    write_page(tmp_path / "page.html", {"a model": results}, [])
    assert "zero shot/clean of each set" in (tmp_path / "page.html").read_text()


def test_damaged_results_are_not_overwritten(clip: Path, tmp_path: Path) -> None:
    wds(tmp_path / "sets" / "a", of_class)
    (tmp_path / "results.json").write_text('{"sets": {"a": 3}}')
    done = invoke("eval", clip, f"eval.sets={tmp_path / 'sets'}", "--out", tmp_path)
    assert done.exit_code == 2 and "cannot be read" in done.stderr and "delete it" in done.stderr
    assert (tmp_path / "results.json").read_text() == '{"sets": {"a": 3}}'


def test_models_are_compared_on_sets(
    clip: Path, tagger: Path, benchmarks: Path, tmp_path: Path, decoded: list[str]
) -> None:
    sets = {"a": str(benchmarks / "wds_mnist"), "b": str(benchmarks / "folders")}
    path = named(tmp_path / "sets.yaml", sets)
    command = ("compare", clip, tagger, f"eval.sets={path}", "eval.knn.k=3", "data.workers=0",
               "--out", tmp_path / "all.json")  # fmt: skip
    done = invoke(*command)
    assert done.exit_code == 0, (done.stderr, done.exception)
    models = json.loads((tmp_path / "all.json").read_text())["models"]
    offered = [
        {name: list(own) for name, own in model["sets"].items()} for model in models.values()
    ]
    assert offered == [
        {"a": ["zero_shot", "knn", "linear_probe"], "b": ["zero_shot"]},
        {"a": ["knn", "linear_probe"]},
    ]
    assert "b" in done.stdout and "mean of 2 sets" in done.stdout
    assert "xray: " in (tmp_path / "all.html").read_text()
    before = len(decoded)
    assert invoke(*command).exit_code == 0 and len(decoded) == before

    named(path, {"b": str(benchmarks / "folders")})  # the first model can run nothing of it
    command = ("compare", tagger, clip, *command[3:])
    done = invoke(*command)
    assert done.exit_code == 0, (done.stderr, done.exception)
    models = json.loads((tmp_path / "all.json").read_text())["models"]
    assert [model.get("sets", {}).keys() for model in models.values()] == [set(), {"b"}]
    named(path, {"c": {"suite": "captions", "shards": str(benchmarks / "listed")}})
    done = invoke(*command)
    assert done.exit_code == 2 and "nor on another of the models" in done.stderr


def with_titles(folder: Path) -> dict[str, Any]:
    """Settings of a list whose captions are in a column of its own."""
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(photo(7000 + i, (32, 32)))
    rows = [("path", "remark"), *((f"{i}.jpg", f"red title {i}") for i in range(4))]
    with (folder / "titles.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return {"shards": str(folder / "titles.csv"), "captions": {"remark": 1.0}}


def test_a_recipe_evaluates_its_sets(
    clip: Path, tagger: Path, benchmarks: Path, tmp_path: Path, decoded: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The last artifact that can run a suite runs it; sets.json has the results of all."""
    recipe = Recipe("named", tmp_path)
    settings = {"sets": str(benchmarks), "knn": {"k": 3}}
    recipe.eval = build(EvalConfig, settings)
    artifacts = [open_artifact(clip), open_artifact(tagger)]
    assert evaluate_recipe(recipe, artifacts) is None  # there are no other suites
    stored = json.loads((tmp_path / "sets.json").read_text())
    assert {name: list(own) for name, own in stored["sets"].items()}["wds_mnist"] == [
        "zero_shot",
        "knn",
        "linear_probe",
    ]
    assert stored["datacomp"]["sets"] == 3 and "mean of 3 sets" in capsys.readouterr().out
    page = write_run_report(recipe, [], None).read_text()
    assert "wds_mnist: kNN top1" in page and "mean of 3 sets: zero-shot top1" in page
    before = len(decoded)
    evaluate_recipe(recipe, artifacts)
    assert json.loads((tmp_path / "sets.json").read_text()) == stored and len(decoded) == before
    recipe.eval = EvalConfig()
    evaluate_recipe(recipe, artifacts)
    assert not (tmp_path / "sets.json").exists()
    many = {"shards": str(benchmarks / "voc2007_multilabel" / "test"),
            "classes": str(benchmarks / "voc2007_multilabel" / "classnames.txt")}  # fmt: skip
    recipe.eval = build(EvalConfig, {"zero_shot": many, "keep_rates": {"rates": [1, 0.5]}})
    assert evaluate_recipe(recipe, artifacts) is not None  # samples with several classes
    mean = json.loads((tmp_path / "results.json").read_text())["zero_shot"][MAP]
    rates = json.loads((tmp_path / "keep_rates.json").read_text())
    data, encoder = DataConfig(resolution=32), Encoder(artifacts[0])
    assert confused(encoder, recipe, data) == ""
    tagged = {"t": with_titles(tmp_path) | {"tags": "caption_words"}}
    sets = Evaluator(Tagger(artifacts[1]), build(EvalConfig, {"tags": tagged}), "", 0).sets
    assert TAGS.run(sets, sets.config.of(TAGS))["t/samples"] == 4
    recipe.eval = build(EvalConfig, {"retrieval": with_titles(tmp_path)})
    assert "of 4 captions the nearest image" in retrieved(encoder, recipe, data)
    assert rates["0.5"].keys() >= {f"zero_shot/{MAP}", f"zero_shot/{MAP}_low"}
    assert 0 < mean <= 1 and rates["1"][f"zero_shot/{MAP}"] <= 1
