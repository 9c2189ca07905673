"""Few-shot classification, against scikit-learn on the same draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_process import invoke
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from vectors import unit

from xray.errors import ConfigError
from xray.evaluation import few_shot as module
from xray.evaluation.feature_extraction import Features
from xray.evaluation.few_shot import draw, few_shot, logistic, prototypes
from xray.evaluation.linear_probe import LinearHead
from xray.evaluation.splits import mean_over_splits
from xray.evaluation.suites.few_shot import FEW_SHOT, FewShotConfig
from xray.evaluation.suites.knn import KNN

if TYPE_CHECKING:
    from conftest import Trained

CLASSES, SHOTS, DRAWS = 5, (1, 2, 4), 3
CONFIG = FewShotConfig(shots=[*SHOTS], draws=DRAWS, seed=7)


def features(samples: int, views: int = 1) -> Features:
    """Draw normalised features of overlapping classes of unequal sizes."""
    labels = torch.cat([torch.arange(CLASSES).repeat(4), torch.arange(samples - 4 * CLASSES) % 3])
    rows = F.normalize(0.6 * unit(CLASSES, 12)[labels][:, None] + unit(samples, views, 12), dim=-1)
    return Features(F.normalize(rows.mean(1), dim=-1), labels, rows)


def test_each_draw_has_other_samples_of_each_class_and_none_twice() -> None:
    labels = features(60).labels
    drawn = draw(labels, 4, 30, seed=0)
    assert drawn.shape == (30, CLASSES, 4)
    assert (labels[drawn] == torch.arange(CLASSES)[:, None]).all()
    assert all(len(own.unique()) == 4 for own in drawn.flatten(0, 1))
    assert torch.equal(drawn, draw(labels, 4, 31, seed=0)[:30])
    assert torch.equal(drawn[..., :2], draw(labels, 2, 30, seed=0))
    assert not torch.equal(drawn, draw(labels, 4, 30, seed=1))
    large = torch.nonzero(labels == 0)[:, 0]  # each sample is drawn about equally often
    often = torch.stack([(drawn[:, 0] == own).sum() for own in large])
    assert often.sum() == 30 * 4 and often.min() > 0 and often.max() < 20


def test_classifiers_equal_those_of_sklearn_on_the_same_draws() -> None:
    train, test = features(60), features(100)
    drawn = draw(train.labels, max(SHOTS), DRAWS, CONFIG.seed)
    expected: dict[str, list[float]] = {}
    for shots in SHOTS:
        points = train.rows[drawn[:, :, :shots]].double()
        fitted = logistic(points, CONFIG.l2), prototypes(points)
        for number in range(DRAWS):
            x, y = points[number].flatten(0, 1), np.repeat(np.arange(CLASSES), shots)
            mean, deviation = x.mean(0), x.std(0) + 1e-6
            judge = LogisticRegression(
                C=1 / (CONFIG.l2 * len(x)), solver="newton-cg", tol=1e-12, max_iter=1000
            ).fit((x - mean) / deviation, y)
            with np.errstate(invalid="ignore"):  # it divides by the variance in a class of one
                nearest = NearestCentroid().fit(x, y)
            far = (test.rows.double() - mean) / deviation
            mine = fitted[0][number].logits(test.rows).softmax(-1)
            assert np.abs(mine.numpy() - judge.predict_proba(far)).max() < 1e-6
            guesses = nearest.predict(test.rows.double())
            assert (fitted[1][number].predict(test.views).numpy() == guesses).all()
            truth = test.labels.numpy()
            expected.setdefault(f"logistic@{shots}", []).append(judge.score(far, truth))
            expected.setdefault(f"prototype@{shots}", []).append((guesses == truth).mean())
    measures = few_shot(train, test, CONFIG)
    for key, shares in expected.items():
        key = key.replace("@", "_top1@")
        assert measures[key] == pytest.approx(np.mean(shares), abs=1e-12)
        half = 4.3027 * np.std(shares, ddof=1) / np.sqrt(DRAWS)  # of Student's t, 2 degrees
        assert measures[f"{key}_high"] == pytest.approx(min(1, np.mean(shares) + half), abs=1e-5)
        assert measures[f"{key}_low"] == pytest.approx(max(0, np.mean(shares) - half), abs=1e-5)
    assert measures["chance_top1"] == 1 / CLASSES and measures["samples"] == 100
    assert measures["chance_top1"] < measures["logistic_top1@1"] < measures["logistic_top1@4"] < 1


def test_draws_that_do_not_fit_into_memory_together_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, test = features(60, views=3), features(40, views=3)
    together = few_shot(train, test, CONFIG)
    calls: list[int] = []

    def counted(points: torch.Tensor, l2: float) -> list[LinearHead]:
        calls.append(len(points))
        return logistic(points, l2)

    monkeypatch.setattr(module, "logistic", counted)
    monkeypatch.setattr(module, "HELD", 1)
    assert few_shot(train, test, CONFIG) == pytest.approx(together)
    assert calls == [1] * DRAWS * len(SHOTS)


def test_rows_over_splits_are_those_of_the_mean() -> None:
    one = {"logistic_top1@1": 0.5, "prototype_top1@1": 0.25, "chance_top1": 0.1}
    one |= {"draws": 2.0, "samples": 4.0}
    both = mean_over_splits({1: one, 2: one})
    assert [row[0] for row in FEW_SHOT.rows(both)] == [row[0] for row in FEW_SHOT.rows(one)]


def test_settings_that_cannot_be_are_refused() -> None:
    wrong: dict[str, Any]
    for wrong, message in (
        ({"shots": []}, r"few_shot\.shots=\[\]"),
        ({"shots": [0, 1]}, r"few_shot\.shots=\[0, 1\]"),
        ({"draws": 1}, "draws must be at least 2"),
        ({"l2": 0.0}, "l2 above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            FewShotConfig(**wrong).validate("eval.few_shot")
    assert FEW_SHOT.sets_from is KNN


def test_the_command_prints_a_row_for_each_number_of_shots(
    trained: Trained, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    artifact = trained("clip", "train.samples=24")
    sets = f"data.root={demo}", "eval.knn={train: gallery, test: heldout}"
    asked = ["eval", artifact, *sets, "--suite", "few_shot", "--out", tmp_path / "r.json"]
    done = invoke(*asked, "eval.few_shot={shots: [1, 2], draws: 4}")
    assert done.exit_code == 0, done.stderr
    told = " ".join(done.stdout.split())
    measures = json.loads((tmp_path / "r.json").read_text())["few_shot"]
    for name, label in (("logistic", "logistic regression"), ("prototype", "nearest class mean")):
        for shots in (1, 2):
            assert f"{shots}-shot {label}" in told
            assert f"{100 * measures[f'{name}_top1@{shots}']:.1f}" in told
    assert "4 draws, 24 samples" in told
    assert (tmp_path / "r.few_shot.png").read_bytes().startswith(b"\x89PNG")
    refused = invoke(*asked, "eval.few_shot.shots=[1, 99]")
    assert refused.exit_code == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert "eval.few_shot.shots: 99 samples per class, but class" in refused.stderr
