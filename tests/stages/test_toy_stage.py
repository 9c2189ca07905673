"""A stage of twenty lines goes through everything that a stage can meet."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from child_process import RECIPE
from in_process import invoke
from safetensors.torch import load_file
from torch import nn

import stages
import xray
from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Sample
from stages.base import (
    Batch,
    Parents,
    Stage,
    StateDict,
    StepOutput,
    VisionModule,
    load_vision,
    part,
)
from xray.ablations.comparison import read_outcome
from xray.ablations.cost import flops_of, plan_of
from xray.ablations.report import visual_samples
from xray.ablations.trials import load_ablation, write_recipes
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.lineage import lineage
from xray.config import RunConfig
from xray.config import loading as cfg
from xray.errors import ArtifactError
from xray.recipes.recipe import load_recipe
from xray.recipes.run import run_recipe
from xray.search.embedding_file import open_embeddings
from xray.training.metrics import read_metrics

# the stage --------------------------------------------------------------------------------------


@dataclass
class ColourOptions:
    weight: float = 1.0


@dataclass
class ColourConfig(RunConfig):
    colour: ColourOptions = field(default_factory=ColourOptions)


class ColourModule(VisionModule):
    """Predicts the mean colour of an image or clip."""

    def __init__(self, config: ColourConfig) -> None:
        super().__init__(config)
        self.head, self.weight = nn.Linear(self.vision.embed_dim, 3), config.colour.weight

    def features(self, batch: Batch, progress: float) -> dict[str, torch.Tensor]:
        pixels = self.normalize(batch["pixels"])
        cls = self.encode(pixels, progress).cls
        return {"guess": self.head(cls), "truth": pixels.mean(dim=(1, 3, 4))}

    def loss_from_features(self, features: dict[str, torch.Tensor]) -> StepOutput:
        error = nn.functional.mse_loss(features["guess"], features["truth"])
        return StepOutput(self.weight * error, {})


class ColourStage(Stage[ColourConfig]):
    name = "colour"
    Config = ColourConfig

    def build(self, parents: Parents) -> ColourModule:
        module = ColourModule(self.config)
        load_vision(module, parents.vision)
        return module

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        return {"pixels": load_pixels(sample, self.config.data, rng)}

    def export(self, module: ColourModule, state: StateDict) -> dict[str, StateDict]:
        return {"backbone": part(state, "towers.vision."), "head": part(state, "head.")}


# its run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The stage's line in STAGES, and its yaml beside the shipped ones."""
    configs = tmp_path_factory.mktemp("shipped") / "configs"
    shutil.copytree(cfg.config_path("stage/mae").parents[1], configs)
    (configs / "stage" / "colour.yaml").write_text("optim: {name: adamw, base_lr: 1e-2}\n")
    before = dict(stages.STAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfg, "config_path", lambda name: configs / f"{name}.yaml")
        stages.STAGES.clear()
        stages.STAGES.update(
            {
                "colour": stages.Place(f"{__name__}:ColourStage", f"{__name__}:ColourConfig"),
                **before,
            }
        )
        yield
    stages.STAGES.clear()
    stages.STAGES.update(before)


def options(demo: Path, out: Path) -> list[str]:
    """The recipe [colour, clip] of three steps each."""
    own = ["stages=[colour,clip]", "train.samples=36", "train.save_every=1", "data.workers=0"]
    no_suites = ['eval.retrieval.shards=""', 'eval.zero_shot.shards=""']
    return [f"data.root={demo}", f"out={out}", *own, *no_suites]


def call(*arguments: object, code: int = 0) -> str:
    done = invoke(*arguments)
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def run(registered: None, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a signal stopped after two of its three steps, and that was resumed."""
    out = tmp_path_factory.mktemp("colour")
    with pytest.MonkeyPatch.context() as patch:
        stop = lambda *given: signal.raise_signal(signal.SIGTERM)  # noqa: E731
        patch.setattr(ColourStage, "after_step", stop)
        call("run", RECIPE, *options(demo, out), code=75)
    assert not (out / "colour" / "artifact").exists()
    assert [row["step"] for row in read_metrics(out / "colour" / "metrics.jsonl")] == [1, 2]
    call("run", RECIPE, *options(demo, out))
    return out


@pytest.fixture(scope="module")
def artifact(run: Path) -> Artifact:
    return open_artifact(run / "colour")


def test_it_is_resumed_and_starts_the_next_stage(run: Path, artifact: Artifact) -> None:
    assert [row["step"] for row in read_metrics(run / "colour" / "metrics.jsonl")] == [1, 2, 3]
    assert artifact.offers == {"vision"}
    chain = [(link.stage, link.slot) for link in lineage(run / "clip")]
    assert chain == [("clip", ""), ("colour", "vision")]


def test_its_card_and_its_report(run: Path, artifact: Artifact) -> None:
    card = (artifact.path / "README.md").read_text()
    assert "# colour model" in card and "A vision backbone for images and clips." in card
    assert "model.encode_image" in card and "tags: [xray, vision, colour]" in card
    call("report", run)
    page = (run / "report.html").read_text()
    assert "<td>colour</td>" in page and "Kept tokens" in page


def test_it_is_planned(registered: None, demo: Path, tmp_path: Path) -> None:
    call("run", RECIPE, *options(demo, tmp_path), "--plan")
    rows = json.loads(call("plan", RECIPE, *options(demo, tmp_path), "--json"))["stages"]
    assert [row["stage"] for row in rows] == ["colour", "clip"]
    assert rows[0]["memory"]["total"] > 0


def test_its_artifact_is_a_model(artifact: Artifact, demo: Path, media: Path, out: Path) -> None:
    model = xray.load(artifact.path, device="cpu")
    features = model.encode_image(media / "photo.jpg")
    assert features.shape == (1, 32)
    with pytest.raises(ArtifactError, match="is of stage colour: tag needs"):
        model.tag(media / "photo.jpg")
    call("embed", artifact.path, media, "--out", out / "rows.npy", "--workers", 0)
    rows = np.concatenate(list(open_embeddings(out / "rows.npy").chunks()))
    assert np.abs(rows - features.numpy()).max(axis=1).min() < 1e-3  # stored in 16 bits
    sets = ("eval.knn.train=gallery", "eval.knn.test=heldout", "eval.knn.k=5")
    results = out / "results.json"
    call("eval", artifact.path, f"data.root={demo}", *sets, "data.workers=0", "--out", results)
    assert json.loads(results.read_text()).keys() == {"knn"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path


def test_it_is_exported(artifact: Artifact, tmp_path: Path) -> None:
    call("export", artifact.path, "--to", "safetensors", "--out", tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["stage"] == "colour" and config["colour"] == {"weight": 1.0}
    ours, theirs = artifact.load("head"), load_file(tmp_path / "plain" / "head.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_is_an_arm_of_an_ablation(registered: None, demo: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        f"base: {RECIPE}\nseeds: [0]\nbaseline: full\n"
        "arms:\n  full: {colour.weight: 1.0}\n  half: {colour.weight: 0.5}\n"
    )
    own = [item for item in options(demo, tmp_path / "out") if not item.startswith("eval")]
    ablation = load_ablation(str(tmp_path / "a.yaml"), [*own, "stages=[colour]"])
    flops = flops_of(ablation, None)
    assert len(flops) == 2 and all(flops.values())
    assert "colour" in plan_of(ablation, flops).html()
    write_recipes(ablation)
    trial = ablation.of("half")[0]
    run_recipe(load_recipe(str(trial.folder / "recipe.yaml")))
    made = read_outcome(trial)
    assert visual_samples(made) == 36
