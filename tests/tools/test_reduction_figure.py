"""The table of token reductions, with and without training at a keep rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.experiments.compare_reductions import select
from tools.experiments.reduction_figure import arms_of, compare, table
from xray.artifacts.artifact import open_artifact
from xray.config.loading import build
from xray.errors import ConfigError
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator

ROOT = Path(__file__).parents[2]
PROOF = ROOT / "docs" / "results" / "proof"


@pytest.mark.parametrize("path", sorted(PROOF.glob("*/figure.json")), ids=lambda p: p.parent.name)
def test_the_page_has_the_tables_of_the_published_files(path: Path) -> None:
    rows = table(json.loads(path.read_text("utf-8"))).splitlines()
    page = (ROOT / "docs" / "proof.md").read_text("utf-8").splitlines()
    assert len(rows) > 4 and [row for row in rows if row not in page] == []


def finished(folder: Path, arms: dict[str, Path]) -> dict[str, Any]:
    """Write what the tool reads of an ablation of artifacts by arm; return its ablation.json."""
    metrics = {"retrieval.text_to_image_R@1": 0.5, "retrieval.image_to_text_R@1": 0.25}
    runs = [{"arm": arm, "seed": 0, **metrics} for arm in arms]
    facts = {"arms": {arm: {} for arm in arms}, "runs": runs, "seeds": [0]}
    (folder / "ablation.json").write_text(json.dumps(facts), "utf-8")
    for arm, artifact in arms.items():
        recipe = folder / "runs" / arm / "seed_0" / "recipe.yaml"
        recipe.parent.mkdir(parents=True)
        recipe.write_text(f"clip: {{out: {artifact.parent}}}", "utf-8")
    return facts


def test_the_model_with_all_tokens_is_evaluated_at_the_rates_of_the_others(
    control: Path, tagger: Path, demo: Path, tmp_path: Path
) -> None:
    finished(tmp_path, {"all": control, "reduced": tagger})
    whole, reduced = compare(tmp_path, str(demo), "heldout", 1, 1)["rows"]
    model = open_artifact(str(tagger)).manifest["config"]["model"]
    assert (whole["reduce"], whole["keep_rate"]) == ("none", 1)
    assert (reduced["reduce"], reduced["keep_rate"]) == (model["reduce"], model["keep_rate"])
    assert reduced["mmacs"] < whole["mmacs"] and reduced["trained"]["image_to_text"] == [0.25]

    config = build(EvalConfig, {"retrieval": {"shards": "heldout"}})
    evaluator = Evaluator.open(open_artifact(str(control)), config, str(demo), 1)
    select(evaluator.sets.vision, (model["reduce"], model["keep_rate"]))
    expected = evaluator.run(["retrieval"])["retrieval"]
    for name, values in reduced["untrained"].items():
        assert values == [pytest.approx(expected[f"{name}_R@1"])]


def test_an_ablation_that_does_not_fit_is_refused(tagger: Path, tmp_path: Path) -> None:
    facts = finished(tmp_path, {"reduced": tagger})
    with pytest.raises(ConfigError, match=r"image_to_text_R@10.*set --k"):
        arms_of(tmp_path, facts, 10)
    with pytest.raises(ConfigError, match="no arm keeps all tokens"):
        compare(tmp_path, "", "heldout", 1, 1)
