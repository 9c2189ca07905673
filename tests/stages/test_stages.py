"""Requirements on each stage: its loss falls, and the next stage starts from its artifact."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import invoke
from tiny import settings, train

from stages import STAGES, stage_class
from xray.errors import ArtifactError, ConfigError
from xray.training.metrics import read_metrics

CHAIN = {"mae": [], "hashtag": ["mae"], "text": [], "clip": ["hashtag", "text"]}


@pytest.fixture(scope="module")
def chain(trained: Callable[..., Path]) -> dict[str, Path]:
    """Runs of all stages, each from its parents, with enough steps for the loss to fall."""
    artifacts: dict[str, Path] = {}
    for stage, parents in CHAIN.items():
        start = [artifacts[parent] for parent in parents]
        artifacts[stage] = trained(stage, "train.samples=480", init_from=start)
    return {stage: artifact.parent for stage, artifact in artifacts.items()}


def test_every_stage_is_covered() -> None:
    assert set(CHAIN) == set(STAGES)


@pytest.mark.parametrize("stage", CHAIN)
def test_the_loss_falls(chain: dict[str, Path], stage: str) -> None:
    losses = [row["loss"] for row in read_metrics(chain[stage] / "metrics.jsonl")]
    assert len(losses) == 40 and all(map(math.isfinite, losses))
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])


def test_a_child_records_the_hash_of_its_parent(chain: dict[str, Path]) -> None:
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.lineage import lineage

    clip = open_artifact(chain["clip"])
    links = lineage(chain["clip"])
    assert [link.stage for link in links] == ["clip", "hashtag", "mae", "text"]
    assert all(link.manifest is not None and link.where == "found" for link in links)
    parent = open_artifact(chain["hashtag"])
    assert clip.manifest["parents"]["vision"]["manifest"] == parent.digest


@pytest.mark.parametrize("stage", ["mae", "hashtag"])
def test_stages_before_clip_log_the_effective_rank(chain: dict[str, Path], stage: str) -> None:
    rows = read_metrics(chain[stage] / "metrics.jsonl")
    assert all(0 < row["photos/effective_rank"] <= 7 for row in rows)  # of 8 photos in a block


def test_keep_rate_reaches_its_target(chain: dict[str, Path]) -> None:
    rows = read_metrics(chain["hashtag"] / "metrics.jsonl")
    assert rows[0]["keep_rate"] == 1 and rows[-1]["keep_rate"] == 0.7
    assert {row["keep_rate"] for row in read_metrics(chain["mae"] / "metrics.jsonl")} == {1}


def test_a_clip_artifact_writes_embeddings_and_scores_for_curation(
    chain: dict[str, Path], demo: Path, tmp_path: Path
) -> None:
    from data_pipelines.curation.config import CurationConfig, DedupConfig, FilterConfig
    from data_pipelines.curation.curate import curate
    from data_pipelines.shards.sidecar import Sidecar, open_sidecar
    from data_pipelines.shards.source import open_source
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.encoders import Encoder, data_of
    from xray.evaluation.feature_extraction import extract, read_all_captions

    photos = tmp_path / "photos"
    shutil.copytree(demo / "heldout", photos)
    source = open_source("photos", str(photos), "image")

    def sidecar_of(command: str, key: str) -> Sidecar:
        options = ["data", command, str(chain["clip"]), str(photos), "workers=0", "batch_size=5"]
        done = invoke(*options)
        assert done.exit_code == 0, done.output
        sidecar = open_sidecar(source, done.output.split(f"{key}=")[1].split()[0])
        assert sidecar is not None
        return sidecar

    artifact = open_artifact(chain["clip"])
    encoder = Encoder(artifact)
    features = extract(source, encoder.encode_pixels, data_of(artifact, 0), 64)
    embeddings = sidecar_of("embeddings", "dedup.embeddings")
    rows = torch.cat([torch.from_numpy(embeddings.table(s)["embeddings"].copy())
                      for s in range(len(embeddings.counts))])  # fmt: skip
    assert torch.allclose(rows, features.rows, atol=1e-5)
    scores = sidecar_of("scores", "filters.scores")
    first = torch.from_numpy(scores.row(0, 0, "score").copy())
    expected = encoder.encode_text(read_all_captions(source)[0]) @ features.rows[0]
    assert torch.allclose(first, expected, atol=1e-5)
    every = torch.cat([torch.from_numpy(scores.table(s)["score"].copy())
                       for s in range(len(scores.counts))])  # fmt: skip

    metadata = tmp_path / "metadata.txt"
    metadata.write_text("a\nthe\ncircle\nsquare\nred\nblue\n")
    limits = FilterConfig(scores=scores.name, min_score=float(every.median()))
    dedup = DedupConfig(embeddings=embeddings.name, cosine=0.999)
    report = curate(source, CurationConfig(str(metadata), filters=limits, dedup=dedup)).report
    taken = {step.name: step.texts for step in report.steps}
    assert taken["scores"] == int((every < every.median()).sum())
    result = invoke("data", "scores", str(chain["mae"]), str(photos))
    assert result.exit_code == 2 and "scores need a clip artifact" in result.output


def test_a_clip_artifact_writes_pseudo_tags(
    chain: dict[str, Path], demo: Path, tmp_path: Path
) -> None:
    from data_pipelines.shards.sidecar import open_sidecar
    from data_pipelines.shards.source import open_source
    from data_pipelines.tags.labels import teacher_sidecar
    from data_pipelines.tags.vocabulary import Vocabulary
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.encoders import Encoder, data_of
    from xray.evaluation.feature_extraction import extract

    photos, tags = tmp_path / "photos", chain["hashtag"] / "artifact" / "vocabulary.json"
    photos.mkdir()
    shard = next((demo / "heldout").glob("*.tar"))
    (photos / "0.tar").write_bytes(shard.read_bytes())
    command = ["data", "pseudo-tags", str(chain["clip"]), str(photos), "threshold=0", "workers=0"]
    refused = invoke(*command)
    assert refused.exit_code == 2 and "needs --vocabulary" in refused.output
    options = ["temperature=2", "template=one {}", "--vocabulary", str(tags)]
    output = invoke(*command, *options).output
    source = open_source("photos", str(photos), "image")
    name = output.split("hashtag.teacher=")[1].split()[0]
    sidecar = open_sidecar(source, teacher_sidecar(name, source, "hashtags", "hashtags", {}))
    assert sidecar is not None

    artifact, names = open_artifact(chain["clip"]), Vocabulary.load(tags).tags
    encoder = Encoder(artifact)
    images = extract(source, encoder.encode_pixels, data_of(artifact, 0), 64).rows
    likeness = images @ encoder.encode_text([f"one {name}" for name in names]).T
    expected = torch.softmax(likeness * artifact.load("head")["logit_scale"].exp() / 2, dim=1)
    for member, row in enumerate(expected):
        ids = torch.from_numpy(sidecar.row(0, member, "ids").astype("int64"))
        scores = torch.from_numpy(sidecar.row(0, member, "scores").copy())
        assert set(row.topk(5).indices.tolist()) <= set(ids.tolist())
        assert torch.allclose(scores, row[ids], atol=1e-6)


def test_a_frozen_text_tower_keeps_its_parents_weights(chain: dict[str, Path]) -> None:
    from xray.artifacts.artifact import open_artifact

    before = open_artifact(chain["text"]).load("text")
    after = open_artifact(chain["clip"]).load("text")
    assert before and all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_gives_the_features_of_the_stages_module(
    chain: dict[str, Path], demo: Path
) -> None:
    from stages.base import split_parents
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.encoders import Encoder

    artifact = open_artifact(chain["clip"])
    encoder = Encoder(artifact)
    pixels = torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8)
    captions = ["a red circle", "a star", "small blue ring on the left"]
    image, text = encoder.encode_pixels(pixels), encoder.encode_text(captions)
    assert torch.allclose(image.norm(dim=-1), torch.ones(3), atol=1e-5)

    config = settings("clip", demo, chain["clip"])
    stage = stage_class("clip")(config)
    parents = split_parents(stage_class("clip"), [open_artifact(chain[s]) for s in CHAIN["clip"]])
    stage.prepare({}, parents)
    module = stage.build(parents).eval()
    tower = artifact.load("text")
    module.towers["text"].load_state_dict(tower, strict=False)
    module.towers["vision"].load_state_dict(artifact.load("backbone"))
    module.load_state_dict(artifact.load("head"), strict=False)
    batch = {
        "pixels": pixels,
        **stage.language.tokenizer.pad([stage.language.tokenizer([c]) for c in captions]),
    }
    with torch.no_grad():
        features = module(batch, 1.0, "features")
    assert torch.allclose(features["image"], image, atol=1e-5)
    assert torch.allclose(features["text"][:, 0], text, atol=1e-5)


def test_wrong_parents_are_refused_by_name(
    chain: dict[str, Path], demo: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"stage mae cannot start from .* of stage text"):
        train("mae", demo, tmp_path / "a", init_from=[chain["text"]])
    with pytest.raises(ConfigError, match="two vision artifacts"):
        train("hashtag", demo, tmp_path / "b", init_from=[chain["mae"], chain["hashtag"]])
    with pytest.raises(ArtifactError, match="of another model"):
        train("hashtag", demo, tmp_path / "c", "model.kwargs.depth=3", init_from=[chain["mae"]])
    with pytest.raises(ArtifactError, match="is not an artifact"):
        train("hashtag", demo, tmp_path / "d", init_from=[tmp_path / "nothing"])
    assert not list(tmp_path.iterdir())  # no run was started


def test_a_vocabulary_that_does_not_match_the_head_is_refused(
    chain: dict[str, Path], demo: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"the head of .* is of another vocabulary"):
        train("hashtag", demo, tmp_path / "x", "hashtag.max_size=5", init_from=[chain["hashtag"]])


def test_an_llm_other_than_the_text_stages_is_refused(
    chain: dict[str, Path], demo: Path, tmp_path: Path
) -> None:
    from xray.config.model import LlmConfig
    from xray.recipes.run import make_llm

    make_llm(LlmConfig(str(tmp_path / "llm"), "photos", 300, 32, 2, 2), str(demo))
    with pytest.raises(ArtifactError, match="is not the one that"):
        train(
            "clip",
            demo,
            tmp_path / "x",
            f"text.llm={tmp_path / 'llm'}",
            init_from=[chain["text"]],
        )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_logit_scale_master_obeys_the_clamp(demo: Path, tmp_path: Path, zero: int) -> None:
    """The fp32 master weight and the export obey the limit after a push above it in each step."""
    from xray.training.engine import Engine

    seen = []
    clamp = Engine.clamp

    def record(self: Engine, parameter: torch.Tensor, low: float, high: float) -> None:
        clamp(self, parameter, high + 0.5, high + 1)  # the push, like a too large optimizer step
        free = float(self.read("logit_scale"))
        clamp(self, parameter, low, high)
        seen.append((free, float(self.read("logit_scale")), high))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "clamp", record)
        artifact = train(
            "clip",
            demo,
            tmp_path / "run",
            f"zero.stage={zero}",
            "clip.logit_scale_max=20",
        )
    assert len(seen) == 6 and all(free > high + 0.4 for free, _, high in seen)
    assert all(after <= high + 1e-6 for _, after, high in seen)
    assert float(artifact.load("head")["logit_scale"].exp()) <= 20.0001


def test_validation_is_deterministic_and_checked_before_training(
    demo: Path, tmp_path: Path
) -> None:
    source = "data.sources.val={shards: heldout, modality: image}"
    val = [source, "data.validation=[{source: val, samples: 8}]"]
    three = ["train.micro_batch=3", "data.blocks=[{source: photos, samples: 3}]"]
    with pytest.raises(ConfigError, match=r"train.micro_batch=3 does not divide the 8"):
        train("mae", demo, tmp_path / "a", *val, *three)
    artifact = train("mae", demo, tmp_path / "b", *val, "train.validate_every=1", "optim.base_lr=0")
    losses = [r["val/loss"] for r in read_metrics(tmp_path / "b" / "metrics.jsonl")[:-1]]
    assert len(losses) == 5 and len({*losses, artifact.manifest["metrics"]["val/loss"]}) == 1


def test_a_run_killed_before_its_export_can_be_resumed(demo: Path, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xray.training.trainer._export", fail)
        with pytest.raises(KeyboardInterrupt):
            train("mae", demo, tmp_path / "run")
    artifact = train("mae", demo, tmp_path / "run")
    assert artifact.manifest["samples"] == 72 and math.isfinite(
        artifact.manifest["metrics"]["loss"]
    )
