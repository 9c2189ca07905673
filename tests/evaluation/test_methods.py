"""Methods of token reduction, compared at several keep rates without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from in_process import invoke

from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import VisionEncoder
from xray.config.loading import build
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.keep_rates import over_methods

if TYPE_CHECKING:
    from conftest import Trained

METHODS = ("evit", "tome", "random")


@pytest.fixture(scope="module")
def artifact(trained: Trained) -> Artifact:
    """A backbone that keeps .7 of its tokens, by EViT."""
    return open_artifact(trained("hashtag", "train.samples=24"))


def evaluator(artifact: Artifact, demo: Path) -> Evaluator:
    sets = {"knn": {"train": "gallery", "test": "heldout", "k": 5}}
    return Evaluator(VisionEncoder(artifact), build(EvalConfig, sets), str(demo), 0)


def test_each_method_has_the_results_of_a_model_with_it(artifact: Artifact, demo: Path) -> None:
    run = evaluator(artifact, demo)
    found = over_methods(run, METHODS, [1.0, 0.5], ["knn"], batch=2)
    encoder = run.sets.vision
    assert (encoder.vision.reduction, encoder.keep_rate) == ("evit", 0.7)  # as before
    assert run.run(["knn"]) == evaluator(artifact, demo).run(["knn"])
    for method, own in found.items():
        alone = evaluator(artifact, demo)
        alone.sets.vision.vision.reduction = method  # type: ignore[assignment]
        alone.sets.vision.keep_rate = 0.5
        top1 = alone.run(["knn"])["knn"]["top1"]
        assert list(own) == ["1", "0.5"] and own["0.5"]["knn/top1"] == top1
        assert own["1"] == found["evit"]["1"] and own["1"]["speed"] == 1
        assert own["0.5"]["gflops"] < own["1"]["gflops"]


def test_a_model_that_keeps_all_tokens_gets_a_method(artifact: Artifact, demo: Path) -> None:
    run, own = evaluator(artifact, demo), evaluator(artifact, demo)
    run.sets.vision.vision.reduction = "none"
    found = over_methods(run, ["evit"], [0.7], ["knn"], batch=2)
    assert found["evit"]["0.7"]["knn/top1"] == own.run(["knn"])["knn"]["top1"]
    assert run.sets.vision.vision.reduction == "none"


def test_the_command_prints_a_table_and_draws_a_plot(
    artifact: Artifact, demo: Path, tmp_path: Path
) -> None:
    sets = "eval.knn={train: gallery, test: heldout, k: 5}"
    given = ["eval", artifact.path, f"data.root={demo}", "data.workers=0", sets]
    rates = ["--keep-rates", "1,.5", "--out", tmp_path / "methods.json"]
    done = invoke(*given, *rates, "--reduce", "evit,random")
    assert done.exit_code == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "all tokens, 1" in text and "EViT, 0.5" in text and "random, 0.5" in text
    assert list(json.loads((tmp_path / "methods.json").read_text())) == ["evit", "random"]
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    for more, message in (
        (["--reduce", "evit"], "--reduce evit: add --keep-rates"),
        (["--reduce", "evit,pruned", "--keep-rates", "1"], "--reduce pruned: use some of evit, to"),
        (["--reduce", "tome", "--keep-rates", ".3"], "must be at least 0.5: model.reduce=tome"),
    ):
        refused = invoke(*given, *more)
        assert refused.exit_code == 2 and message in refused.stderr, refused.output
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
