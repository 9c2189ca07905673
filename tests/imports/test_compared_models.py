"""`xray compare` and `xray eval` on released weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import invoke
from released import Released, of_timm

from xray.evaluation.comparison import notes_of


def test_released_weights_stand_beside_artifacts(
    few: Path, released: Released, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the released weights has the results of its artifact."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    backbone = of_timm(tmp_path / "vit")
    sets = [f"eval.retrieval.shards={few}/heldout", f"eval.knn.train={few}/heldout"]
    sets += [f"eval.knn.test={few}/heldout", "eval.knn.k=3"]
    models = [imported, released.folder, backbone.folder]
    done = invoke("compare", *models, *sets, "--out", tmp_path / "all.json")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "all.json").read_text())["models"]
    ours, theirs, plain = (own["results"] for own in content.values())
    assert [*content][::2] == [imported.parent.name, "vit"]
    assert ours == theirs and ours.keys() == {"retrieval", "knn", "overlap"}
    assert plain.keys() == {"knn", "overlap"} and plain["overlap"] == {"knn.test in train": 1.0}
    assert "text to image R@1" in done.stdout and "kNN top1" in done.stdout
    for line in (  # of all three models, and told once
        "overlap: what the imported weights were trained on is not known",
        "overlap: 100.0 % of the samples of eval.knn.test are in the training set of the same",
    ):
        assert [told.startswith(line) for told in done.stdout.splitlines()].count(True) == 1
    cached = list((tmp_path / "cache" / "xray" / "imports").glob("*/manifest.json"))
    assert len(cached) == 2
    times = [path.stat().st_mtime_ns for path in cached]
    done = invoke("eval", released.folder, *sets, "--suite", "retrieval")
    assert done.exit_code == 0 and "text to image R@1" in done.stdout, done.output
    assert [path.stat().st_mtime_ns for path in cached] == times  # not imported again
    done = invoke("compare", imported, *sets)
    assert done.exit_code == 2 and "at least two models" in done.stderr


def test_a_note_names_the_models_that_it_is_about() -> None:
    lines = {"a": ["trained on", "unknown"], "b": ["unknown"], "c": ["trained on", "unknown"]}
    assert notes_of(lines) == ["a, c: trained on", "unknown"]
