"""The experiments of docs/proof.md: files and results agree, and the main one runs in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from in_process import invoke
from source_code import ROOT

from tools.experiments import scarce_data, scarce_figure
from xray.ablations.trials import load_ablation

PROOF = ROOT / "docs" / "results" / "proof"
PROBE = {"train": "gallery", "test": "heldout"}
SMALL = ("mae_hashtag_clip_900",)


@pytest.mark.parametrize("file", sorted(PROOF.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_results_are_of_the_arms_of_the_file(file: Path, demo: Path) -> None:
    llm = [] if "base: quickstart" in file.read_text() else [f"text.llm={demo / 'llm'}"]
    ablation = load_ablation(str(file), [f"data.root={demo}", *llm, "seeds=[0]"])
    results = PROOF / file.stem / "ablation.json"
    if results.is_file():
        facts = json.loads(results.read_text())
        assert [*facts["arms"]] == [*ablation.arms]


def small(file: Path) -> dict[str, Any]:
    """Read the experiment with few captions: one arm, a few steps, the data of the tests."""
    content = yaml.safe_load(file.read_text())
    arms = {name: content["arms"][name] for name in SMALL}
    common = {
        **{f"{stage}.train.samples": 68 for stage in ("mae", "hashtag", "clip")},
        "hashtag.min_count": 2,
        "eval.retrieval": {"shards": "heldout"},
        "eval.video_retrieval": {"shards": "clips"},
        "eval.knn": {**PROBE, "k": 5},
        "eval.linear_probe": PROBE,
        "eval.few_shot": {**PROBE, "shots": [5], "draws": 2},
        "eval.zero_shot.shards": "",
        "eval.tags.photos.shards": "heldout",
        "eval.tags.clips.shards": "clips",
    }
    return content | {"common": common, "arms": arms, "seeds": [0], "baseline": SMALL[0]}


def test_few_captions_in_small(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ("heldout", "gallery", "llm", "clips"):
        (root / name).symlink_to(demo / name)
    (root / "actions_train").symlink_to(demo / "clips")
    given = [str(demo / "photos"), str(root / "scarce"), "--captioned", "24"]
    monkeypatch.setattr(sys, "argv", ["scarce_data", *given])
    scarce_data.main()
    (root / "scarce/captioned/24").rename(root / "scarce/captioned/900")
    file = tmp_path / "scarce.yaml"
    file.write_text(yaml.safe_dump(small(PROOF / "scarce.yaml")))
    settings = [f"data.root={root}", f"text.llm={root / 'llm'}", f"out={tmp_path / 'out'}"]
    tiny = ["data.resolution=16", "model.kwargs={embed_dim: 32, depth: 4, num_heads: 2}"]
    done = invoke("ablate", str(file), *settings, *tiny, "data.workers=0")
    assert done.exit_code == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["scarce_figure", str(tmp_path / "out")])
    scarce_figure.main()
    assert "| 900 | mae, hashtag, clip | 1 |" in capsys.readouterr().out
    assert (tmp_path / "out/figure.png").is_file()
