"""The report of a run: its sections, and the sections left out without data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from in_process import invoke
from shards import photo, write_tar
from tiny import copy_run

from data_pipelines.shards.source import open_source
from xray.artifacts.artifact import open_artifact
from xray.config import DataConfig
from xray.config.loading import build
from xray.evaluation.config import EvalConfig
from xray.recipes.recipe import Recipe
from xray.recipes.report import curves
from xray.recipes.report_examples import _matrix, _mistakes, read_examples
from xray.recipes.run import evaluate
from xray.reports.html import Card, cards, gallery, write_report
from xray.reports.tables import ResultTable


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture(scope="module")
def run(tagger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with only a hashtag stage."""
    folder = tmp_path_factory.mktemp("report")
    copy_run(tagger, folder / "hashtag")
    return folder


def test_a_report_is_rewritten_from_the_runs_files(run: Path) -> None:
    done = invoke("report", str(run))
    assert done.exit_code == 0, done.output
    page = (run / "report.html").read_text()
    titles = headings(page)
    assert titles[:2] == ["Training", "Data"] and {"Most probable tags", "Stages"} <= set(titles)
    assert not {"Results", "Images retrieved for captions", "Zero-shot classes"} & set(titles)
    assert not [title for title in titles if title.startswith("MAE")]
    # The page loads nothing from the network.
    assert "http" not in page and 'name="viewport"' in page
    assert re.findall(r"<img alt=\"([^\"]+) over samples seen", page) == [
        "loss", "samples per second", "learning rate", "keep rate"
    ]  # fmt: skip
    (run / "results.json").write_text(
        json.dumps({"knn": {"top1": 0.5, "chance_top1": 0.1, "samples": 8}})
    )
    assert invoke("report", str(run)).exit_code == 0
    assert headings((run / "report.html").read_text())[0] == "Results"


def test_accuracy_against_speed_is_measured_at_the_end_of_a_recipe(
    tagger: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(tagger, tmp_path / "hashtag")
    recipe = Recipe("own", tmp_path, root=str(demo))
    sections = {"knn": {"train": "gallery", "test": "heldout", "k": 5}, "keep_rates": {}}
    for rates, names in (([1, 0.5], ["0.5", "1"]), ([], [])):
        sections["keep_rates"] = {"rates": rates}
        recipe.eval = build(EvalConfig, sections)
        assert evaluate(recipe, [open_artifact(tmp_path / "hashtag" / "artifact")]) is not None
        measured = tmp_path / "keep_rates.json"
        assert sorted(json.loads(measured.read_text()) if measured.exists() else []) == names
        assert invoke("report", str(tmp_path)).exit_code == 0
        page = (tmp_path / "report.html").read_text()
        assert ("Accuracy against speed" in headings(page)) == bool(rates)
        assert ("accuracy against speed, by keep rate" in page) == bool(rates)
    recipe.eval.keep_rates.rates = [0.5]
    (tmp_path / "results.json").unlink()
    monkeypatch.setattr("xray.recipes.run.over_keep_rates", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(recipe, [open_artifact(tmp_path / "hashtag" / "artifact")])
    assert "knn" in json.loads((tmp_path / "results.json").read_text())


def test_a_stage_in_training_gets_a_report_without_an_artifact(run: Path) -> None:
    stage = run / "hashtag"
    (stage / "artifact").rename(stage / "later")
    try:
        done = invoke("report", str(stage))
    finally:
        (stage / "later").rename(stage / "artifact")
    assert done.exit_code == 0, done.output
    assert headings((stage / "report.html").read_text()) == ["Training", "Data"]


@pytest.mark.parametrize("older", (False, True))
def test_a_run_that_was_moved_has_its_report_from_any_folder(
    older: bool, tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_run(tagger, tmp_path / "runs" / "begun" / "hashtag")
    assert invoke("report", "runs/begun").exit_code == 0
    facts = tmp_path / "runs" / "begun" / "report.json"
    if older:
        stages = {"hashtag": "runs/begun/hashtag"}
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"stages": stages}))
    (tmp_path / "runs" / "begun").rename(tmp_path / "moved")
    if older:  # whose data are not found from another folder
        config = tmp_path / "moved" / "hashtag" / "config.yaml"
        config.write_text(re.sub("root: .*", "root: data", config.read_text()))
    monkeypatch.chdir(tmp_path / "runs")
    done = invoke("report", "../moved")
    assert done.exit_code == 0, done.output
    titles = headings((tmp_path / "moved" / "report.html").read_text())
    assert "Stages" in titles and ("Most probable tags" in titles) != older


def test_a_folder_without_a_run_gives_an_error_of_one_line(tmp_path: Path) -> None:
    done = invoke("report", str(tmp_path))
    assert done.exit_code == 2 and "contains no run" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_empty_data_gives_no_section() -> None:
    assert curves({"mae": [], "clip": []}) == gallery("Training", []) == cards("Tags", []) == ""
    assert "keep rate" not in curves({"clip": [{"samples": 8, "loss": 1.0}]})


def test_confused_classes_are_counted() -> None:
    names = [f"class {n}" for n in range(20)]
    labels, guesses = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([1, 1, 0, 1, 3])
    assert _mistakes(names, labels, guesses).rows == [
        ("class 0", "class 1", "2"),
        ("class 2", "class 3", "1"),
    ]
    assert _matrix(names[:4], labels, guesses).startswith("<img")


def test_text_is_escaped_in_html(tmp_path: Path) -> None:
    card = Card(torch.zeros(3, 4, 4), ["<script>alert(1)</script>"])
    table = ResultTable("<b>", ("<i>",), [("<u>",)])
    write_report(tmp_path / "x.html", "<title>", [cards("<em>", [card]), table.html()])
    page = (tmp_path / "x.html").read_text()
    for tag in ("<script", "<b>", "<i>", "<u>", "<em>"):
        assert tag not in page


def test_a_table_prints_markup_literally(capsys: pytest.CaptureFixture[str]) -> None:
    ResultTable("[bold]t", ("[i]c", "d"), [("see [/url] now", "[red]x")]).print()
    printed = capsys.readouterr().out
    for text in ("[bold]t", "[i]c", "see [/url] now", "[red]x"):
        assert text in printed


def test_samples_keep_their_captions_and_classes(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(6):
        files[f"{number}.jpg"], files[f"{number}.cls"] = photo(number), str(number).encode()
        if number % 2:
            files[f"{number}.txt"] = f"picture {number}".encode()
    files["2.jpg"] = b"no picture"
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "0.tar", files)
    source = open_source("set", str(tmp_path / "set"), "image")
    samples = read_examples(source, DataConfig(resolution=16))
    assert samples.labels == [0, 1, 3, 4, 5] and len(samples.pixels) == 5
    assert samples.captions == [[], ["picture 1"], ["picture 3"], [], ["picture 5"]]


def test_class_names_with_dollar_signs_are_not_parsed_as_formulas() -> None:
    assert _matrix(["$a_$", "$x$"], torch.tensor([0, 1]), torch.tensor([1, 1])).startswith("<img")


def test_a_damaged_record_gives_an_error_of_one_line(run: Path) -> None:
    (run / "report.json").write_text("{")
    done = invoke("report", str(run))
    (run / "report.json").unlink()
    assert done.exit_code == 2 and "report.json cannot be read" in done.stderr
