"""Suites on the three splits of HMDB51: each clip is encoded once, and measures are means."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from in_process import invoke
from sklearn.neighbors import KNeighborsClassifier

from data_pipelines.shards.source import Source, open_source
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, class_weights
from xray.config import DataConfig
from xray.config.loading import build, parse_overrides
from xray.errors import ConfigError, XrayError
from xray.evaluation import feature_extraction
from xray.evaluation.config import EvalConfig
from xray.evaluation.datasets import Sets
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.feature_extraction import Views
from xray.evaluation.heads import open_heads
from xray.evaluation.set_runs import SetRun
from xray.evaluation.suites import result_table
from xray.recipes.recipe import Recipe
from xray.recipes.report_examples import confused

if TYPE_CHECKING:
    from conftest import Trained

CLASSES = ("do_this", "do_that")
SUITES = ("zero_shot", "knn", "linear_probe", "attentive_probe", "finetune")


@pytest.fixture(scope="module")
def hmdb(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's clips in two class folders, and three splits; some clips are in none."""
    root = tmp_path_factory.mktemp("hmdb")
    source, rng = open_source("clips", str(demo / "clips"), "video"), np.random.default_rng(1)
    (root / "splits").mkdir()
    for number, place in enumerate(source.places()):
        path = root / "clips" / CLASSES[number % 2] / f"clip_{number:02d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(*place, ("mp4",))["mp4"])
    for split in (1, 2, 3):
        for label in CLASSES:
            own = sorted((root / "clips" / label).iterdir())[:-1]
            uses = rng.permutation([1] * 4 + [2] * 2 + [0] * 5)
            lines = [f"{path.stem}.avi {use}\n" for path, use in zip(own, uses, strict=True)]
            (root / "splits" / f"{label}_test_split{split}.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def artifact(trained: Trained) -> Any:
    return open_artifact(trained("clip", "train.samples=24"))


def settings(split: object) -> list[str]:
    own = f"splits: splits, split: {split}, modality: video"
    return [
        f"eval.zero_shot={{shards: clips, {own}, templates: ['a {{}}']}}",
        f"eval.knn={{train: clips, {own}, k: 3}}",
        *("eval.attentive_probe.epochs=1", "eval.finetune.epochs=1", "eval.finetune.batch_size=4"),
        # one clip in a batch: its features do not depend on what else is encoded
        *("eval.views.clips=2", "eval.views.crops=3", "eval.batch_size=6"),
    ]


def evaluator(artifact: Any, root: Path, split: object, *more: str) -> Evaluator:
    given = parse_overrides([*settings(split), *more])["eval"]
    return Evaluator(Encoder(artifact), build(EvalConfig, given), str(root), 0)


def test_measures_are_means_over_splits(
    hmdb: Path, artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    views: set[tuple[int, int]] = set()
    original = feature_extraction.view_pixels

    def counted(sample: Any, source: Source, data: Any, own: Views) -> torch.Tensor:
        seen[sample.key] += 1
        views.add((own.clips, own.crops))
        return original(sample, source, data, own)

    monkeypatch.setattr(feature_extraction, "view_pixels", counted)
    every = evaluator(artifact, hmdb, "all")
    results = every.run(["zero_shot", "knn", "linear_probe"])
    whole = every.sets.open("knn", "clips", "video")
    used = {sample for sample, n in seen.items() if n == 1}
    assert set(seen.values()) == {1} and len(used) <= 22 and views == {(2, 3)}
    results = {**results, **every.run(["attentive_probe"])}
    assert {seen[sample] for sample in used} == {2}  # the tokens of a clip are stored once, too
    results = {**results, **every.run(["finetune"])}
    assert views == {(2, 3)}
    alone = {n: evaluator(artifact, hmdb, n).run(SUITES) for n in (1, 2, 3)}
    for suite in SUITES:
        assert results[suite]["splits"] == 3 and results[suite]["samples"] == 4
        for name in alone[1][suite].keys() - {"split"}:
            values = [alone[n][suite][name] for n in (1, 2, 3)]
            assert results[suite][name] == pytest.approx(np.mean(values), abs=1e-6), name
            assert results[suite][f"split_2_{name}"] == pytest.approx(values[1], abs=1e-6)
    features = every.sets.encode(whole)
    judged(hmdb, features["backbone"], features["joint"], every, whole, results)
    table = result_table(results)
    assert all(row[3].endswith(", mean of 3 splits") for row in table.rows)
    assert "4 samples, split 2" in [row[3] for row in result_table(alone[2]).rows]


def test_named_sets_share_the_clips_of_splits(
    hmdb: Path, artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    original = feature_extraction.view_pixels

    def counted(sample: Any, *given: Any) -> torch.Tensor:
        seen[sample.key] += 1
        return original(sample, *given)

    monkeypatch.setattr(feature_extraction, "view_pixels", counted)
    encoder, clips, video = Encoder(artifact), str(hmdb / "clips"), {"modality": "video"}
    divided = video | {"splits": str(hmdb / "splits")}

    def run(sets: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / "sets.yaml").write_text(json.dumps(sets))  # json is yaml
        config = build(EvalConfig, {"sets": str(tmp_path / "sets.yaml")})
        found = SetRun(Evaluator(encoder, config, "", 0)).evaluate({}, lambda results: None)
        return {name: result.measures for name, own in found.items() for result in own.values()}

    first = {"suite": "zero_shot", "shards": clips, "split": 1, **divided}
    same = {"suite": "knn", "train": clips, "split": 1, "k": 3, **divided}
    whole = {"suite": "zero_shot", "shards": clips, **video}
    after = same | {"split": 2}
    found = run({"first": first, "same": same, "whole": whole, "after": after})
    assert len(seen) == 24 and set(seen.values()) == {1}
    assert run({"after": after})["after"] == pytest.approx(found["after"], abs=1e-6)


def judged(
    hmdb: Path, backbone: Any, joint: Any, every: Evaluator, whole: Any, results: Any
) -> None:
    """Compare kNN with scikit-learn, and zero-shot with a loop, on features of the whole folder."""
    stems = [item.path.stem for item in whole.items]
    labels = np.array([CLASSES[::-1].index(item.path.parent.name) for item in whole.items])
    weights = class_weights(every.sets.texts, ["do that", "do this"], ["a {}"])
    nearest, prompted = [], []
    for split in (1, 2, 3):
        uses = {}
        for path in (hmdb / "splits").glob(f"*_test_split{split}.txt"):
            uses |= dict(line.split() for line in path.read_text().splitlines())
        marks = np.array([uses.get(f"{stem}.avi", "0") for stem in stems])
        train, test = backbone.rows[marks == "1"], backbone.rows[marks == "2"]
        judge = KNeighborsClassifier(
            3, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute"
        ).fit(train.double().numpy(), labels[marks == "1"])
        nearest.append(judge.score(test.double().numpy(), labels[marks == "2"]))
        hits = [
            int((weights @ row).argmax()) == label
            for row, label in zip(joint.rows[marks == "2"], labels[marks == "2"], strict=True)
        ]
        prompted.append(np.mean(hits))
    assert results["knn"]["top1"] == pytest.approx(np.mean(nearest), abs=1e-6)
    assert results["zero_shot"]["top1"] == pytest.approx(np.mean(prompted), abs=1e-6)


def test_named_sets_have_splits(hmdb: Path, artifact: Any) -> None:
    """A set of eval.sets is checked and measured on each split, as the suites alone are."""
    own: dict[str, Any] = {"suite": ["zero_shot", "knn"], "shards": "clips", "train": "clips"}
    own |= {"splits": "splits", "modality": "video", "templates": ["a {}"], "k": 3}
    (hmdb / "sets.yaml").write_text(json.dumps({"hmdb": own}))
    views = "eval.views={clips: 1, crops: 1}"
    alone = evaluator(artifact, hmdb, "all", views)
    named = evaluator(artifact, hmdb, "all", views, "eval.sets=sets.yaml")
    results = SetRun(named).evaluate({}, lambda results: None)["hmdb"]
    assert results.keys() == {"zero_shot", "knn"}
    for suite, measures in alone.run([*results]).items():
        assert results[suite].measures == pytest.approx(measures) and measures["splits"] == 3
    (hmdb / "sets.yaml").write_text(json.dumps({"hmdb": own | {"k": 9}}))
    with pytest.raises(XrayError, match="set hmdb: kNN with k=9 needs that many samples"):
        SetRun(named).evaluate({}, lambda results: pytest.fail("a set has run"))


def test_suites_without_splits_of_their_own(
    hmdb: Path, artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Robustness reads the heads of other suites: on one split, not on the mean."""
    monkeypatch.setattr(Sets, "encode", lambda *_: pytest.fail("something is encoded"))
    with pytest.raises(ConfigError, match=r"eval.zero_shot.split=all: a suite that uses"):
        evaluator(artifact, hmdb, "all").run(["knn", "robustness"])
    own = {"suite": "robustness", "shards": "clips", "train": "clips", "splits": "splits"}
    own["modality"] = "video"
    (hmdb / "robust.yaml").write_text(json.dumps({"hmdb": own}))
    named = evaluator(artifact, hmdb, "all", "eval.sets=robust.yaml")
    with pytest.raises(ConfigError, match=r"set hmdb: split=all: a suite that uses these"):
        SetRun(named).evaluate({}, lambda results: pytest.fail("a set has run"))
    monkeypatch.undo()
    recipe = Recipe("splits", hmdb, root=str(hmdb))
    recipe.eval = evaluator(artifact, hmdb, "all").config
    page = confused(Encoder(artifact), recipe, DataConfig(resolution=32, frames=2))
    assert "Of 4 samples" in page  # of the first split
    heads = list(open_heads(evaluator(artifact, hmdb, 3, "eval.linear_probe.solver=sgd").sets))
    assert [head.name for head in heads] == ["zero_shot", "linear_probe"]
    assert {len(head.labels) for head in heads} == {4}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("eval.knn={train: clips, test: clips, splits: splits}", "remove eval.knn.test"),
        ("eval.knn={splits: splits}", "eval.knn.splits is set: set eval.knn.train, too"),
        ("eval.knn={train: clips, test: clips, split: 2}", "split=2: set eval.knn.splits, too"),
        ("eval.zero_shot={shards: clips, split: 2}", "set eval.zero_shot.splits, too"),
        ("eval.knn={train: clips, splits: splits, split: 4}", "eval.knn.split: "),
        (
            "eval.knn={train: clips, splits: gone, modality: video}",
            "splits=gone: there is no",
        ),
        ("eval.knn={train: clips, splits: clips, modality: video}", "has no split files"),
    ],
)
def test_mistakes_are_one_line(hmdb: Path, artifact: Any, given: str, says: str) -> None:
    done = invoke("eval", artifact.path, f"data.root={hmdb}", given)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.exit_code in (1, 2) and says in " ".join(done.stderr.split()), done.stderr
    assert len(lines) <= 4
