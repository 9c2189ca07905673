"""A loss that is added to its table and nowhere else trains, is evaluated and shows its chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from in_process import invoke
from tiny import train
from torch import Tensor

from xray.losses import named, tags


class Hinge(named.ContrastiveLoss):
    """Hinge loss of a margin between each pair and all others (VSE, 1411.2539)."""

    logit_scale = 2.0
    margin = 0.2

    def chance(self, samples: int, captions: int = 1) -> float:
        return self.margin * (samples - 1)

    def __call__(
        self, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor | None, *ids: Tensor | None
    ) -> Tensor:
        cosines = queries @ keys.t()
        excess = (self.margin + cosines - cosines.diagonal()[:, None]).clamp(min=0)
        return (excess.sum() - excess.diagonal().sum()) / len(queries) + 0 * scale


class Brier(tags.AsymmetricLoss):
    """Squared error of each tag's probability."""

    def positive(self, logits: Tensor) -> Tensor:
        return (1 - logits.sigmoid()) ** 2

    def negative(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() ** 2


def evaluate(artifact: Path, *arguments: str) -> dict[str, float]:
    out = artifact.parent / "results.json"
    done = invoke("eval", str(artifact), *arguments, "--out", str(out))
    assert done.exit_code == 0, done.output
    (measures,) = json.loads(out.read_text()).values()
    return measures


def test_a_contrastive_loss(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(named.CONTRASTIVE_LOSSES, "hinge", Hinge())
    caplog.set_level("INFO", logger="xray")
    options = "clip.loss=hinge", "train.samples=24", "debug.overfit_batch=true"
    artifact = train("clip", demo, tmp_path, *options)
    assert "guessing gives 1.400" in caplog.text and "guessing gives 0.600" in caplog.text
    head = artifact.load("head")
    assert "logit_bias" not in head
    assert head["logit_scale"].exp().item() == pytest.approx(2, abs=0.1)
    measures = evaluate(artifact.path, f"data.root={demo}", "eval.retrieval.shards=heldout")
    assert 0 <= measures["text_to_image_R@1"] <= 1


def test_a_tag_loss(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(named.TAG_LOSSES, "brier", f"{__name__}:Brier")
    caplog.set_level("INFO", logger="xray")
    artifact = train("hashtag", demo, tmp_path, "hashtag.loss=brier", "train.samples=24")
    (line,) = [line for line in caplog.messages if line.startswith("chance: ")]
    chance = float(line.split()[-1])
    assert 0 < chance < len(artifact.load("head")["bias"]) / 4  # the sum of p (1 - p) of all tags
    assert artifact.manifest["metrics"]["loss"] == pytest.approx(chance, rel=0.5)
    measures = evaluate(artifact.path, f"data.root={demo}", "eval.tags.own.shards=heldout")
    assert 0 <= measures["own/mAP"] <= 1 and math.isfinite(measures["own/ece"])


def test_chance_of_the_toy_losses() -> None:
    same = torch.ones(5, 4) / 2
    loss = Hinge()(same, same, torch.tensor(1.0), None)
    assert float(loss) == pytest.approx(Hinge().chance(5))
    assert Brier().chance(torch.tensor([0.5, 0.25])) == pytest.approx(0.25 + 0.1875)
