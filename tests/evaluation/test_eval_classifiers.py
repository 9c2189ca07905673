"""Fine-tuning, the attentive probe and robustness in evaluations of one small artifact."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from evaluating import evaluator, results
from in_process import invoke

from data_pipelines.shards.source import Source
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import Encoder
from xray.errors import DataError
from xray.evaluation import feature_extraction as features
from xray.evaluation.attentive_probe import attentive_probe
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import labels_of
from xray.evaluation.few_shot import draw
from xray.evaluation.finetune import Classifier, finetune
from xray.evaluation.heads import open_heads
from xray.evaluation.suites.attentive_probe import ATTENTIVE_PROBE
from xray.evaluation.suites.finetune import FINETUNE

if TYPE_CHECKING:
    from conftest import Trained


@pytest.fixture(scope="module")
def clip(trained: Trained) -> Artifact:
    return open_artifact(trained("clip", "train.samples=24"))


def test_robustness_as_json_and_plot(clip: Artifact, demo: Path, tmp_path: Path) -> None:
    measures = results(
        clip, tmp_path, "--suite", "robustness", f"data.root={demo}",
        "eval.zero_shot={shards: heldout, classes: classes.txt}",
        "eval.linear_probe={train: gallery, test: heldout}",
        "eval.robustness={corruptions: [contrast, pixelate], severities: [1, 5], queries: 5, "
        "resolutions: [.5], aspects: [2], attacked: 10, eps: [8], shift: heldout}",
    )["robustness"]  # fmt: skip
    for head in ("zero_shot", "linear_probe"):
        own = {
            key.removeprefix(f"{head}/"): value for key, value in measures.items() if head in key
        }
        assert own["samples"] == 24 and own["attacked_samples"] == 10
        assert own["contrast"] == pytest.approx((own["contrast/1"] + own["contrast/5"]) / 2)
        assert own["corrupted"] == pytest.approx((own["contrast"] + own["pixelate"]) / 2)
        assert own["shift"] == own["clean"] and own["shift_gap"] == 0
        assert {"resolution/16", "aspect/2", "fgsm/8", "pgd/8", "square/8"} <= own.keys()
        assert own["pgd/8"] <= own["attacked_clean"]
        assert own["clean_low"] <= own["clean"] <= own["clean_high"]
    assert (tmp_path / "results.robustness.png").stat().st_size > 10_000


def test_fine_tuning_learns_and_is_reproducible(clip: Artifact, folder: Path) -> None:
    data = "eval.knn={train: grounds.csv, test: grounds.csv}"
    settings = "eval.finetune={epochs: 60, batch_size: 8, base_lr: .06, layer_decay: 1, mixup: .2}"
    run = evaluator(clip, folder, data, settings).sets
    measures = finetune(run, run.config.of(FINETUNE))
    assert (
        measures["top1"] > 0.9 and measures["top1_low"] <= measures["top1"] <= measures["top1_high"]
    )
    short = evaluator(clip, folder, data, "eval.finetune.epochs=1").sets
    one_epoch = short.config.of(FINETUNE)
    first = finetune(short, one_epoch)
    torch.rand(3)
    assert finetune(short, one_epoch) == first and first["train_loss"] > measures["train_loss"]


def test_fine_tuning_on_some_samples_of_each_class_reads_no_other(
    clip: Artifact, folder: Path, tmp_path: Path
) -> None:
    """All other pictures of the training set are broken."""
    place = Path(shutil.copytree(folder / "set", tmp_path / "set"))
    sets = f"eval.finetune={{train: {place}, test: {folder / 'set'}, epochs: 1, shots: 1}}"
    run = evaluator(clip, folder, sets).sets
    config = run.config.of(FINETUNE)
    source, _ = run.labelled("finetune", config)
    labels = labels_of(source)
    chosen = draw(labels, 1, 1, config.seed).flatten().tolist()
    assert sorted(labels[chosen].tolist()) == sorted(set(labels.tolist()))
    whole = finetune(run, config)
    for number, file in enumerate(sorted(place.rglob("*.jpg"))):
        if number not in chosen:
            file.write_bytes(b"no picture")
    broken = evaluator(clip, folder, sets).sets
    assert finetune(broken, config) == whole and whole["train_samples"] == len(chosen)


def test_a_broken_training_image_is_one_line_of_error(
    clip: Artifact, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "set", tmp_path / "set")
    victim = sorted((tmp_path / "set").rglob("*.jpg"))[5]
    victim.write_bytes(b"no picture")
    sets = f"eval.finetune={{train: {tmp_path / 'set'}, test: {folder / 'set'}, epochs: 1}}"
    done = invoke("eval", clip.path, "--suite", "finetune", sets, "data.workers=1")
    assert done.exit_code == 2 and victim.stem in done.stderr, done.stderr
    assert "undecodable image" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_fine_tuning_starts_from_the_artifact(clip: Artifact, demo: Path) -> None:
    encoder = Encoder(clip)
    model = Classifier(encoder, 5, drop_path=0.1).eval()
    pixels = torch.randint(256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    mine = model.towers["vision"](model.normalize(pixels), model.keep_rate).cls
    assert torch.equal(F.normalize(mine, dim=-1), encoder.features(pixels))
    before = encoder.vision.state_dict()["blocks.0.attn.qkv.weight"].clone()
    model.towers["vision"].blocks[0].attn.qkv.weight.data.zero_()
    assert torch.equal(encoder.vision.state_dict()["blocks.0.attn.qkv.weight"], before)


def test_an_attentive_probe_learns_clips(clip: Artifact, folder: Path) -> None:
    """Classify the background of a clip from two views."""
    sets = evaluator(
        clip, folder, "eval.attentive_probe.epochs=60", "eval.views.clips=2",
        "eval.knn={train: clips.csv, test: clips.csv, modality: video}",
    ).sets  # fmt: skip
    settings = sets.config.of(ATTENTIVE_PROBE)
    measures = attentive_probe(sets, settings)
    assert measures["top1"] > 0.9 and attentive_probe(sets, settings) == measures
    short = dataclasses.replace(settings, epochs=1)
    assert attentive_probe(sets, short)["top1"] < measures["top1"]


def test_attacks_on_images_of_a_folder(clip: Artifact, folder: Path) -> None:
    """Only some samples are attacked; an eps near 0 changes nothing."""
    measures = evaluator(
        clip, folder, "eval.zero_shot.shards=set", "eval.robustness.attacked=7",
        "eval.robustness={corruptions: [], resolutions: [], aspects: [], eps: [1e-6, 30]}",
    ).run(["robustness"])["robustness"]  # fmt: skip
    assert measures["zero_shot/attacked_samples"] == 7
    for attack in ("fgsm", "pgd", "square"):
        assert measures[f"zero_shot/{attack}/1e-06"] == measures["zero_shot/attacked_clean"]
    assert measures["zero_shot/pgd/30"] == 0 and "zero_shot/corrupted" not in measures


def test_unknown_classes_of_the_shifted_set_fail_before_any_corruption(
    clip: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = evaluator(
        clip, folder, "eval.zero_shot.shards=set", "eval.robustness.shift=grounds.csv"
    )  # fmt: skip
    seen: list[str] = []
    encode = Sets.encode

    def counted(sets: Sets, source: Source, *more: Any) -> dict[str, features.Features]:
        seen.append(source.name)
        return encode(sets, source, *more)

    monkeypatch.setattr(Sets, "encode", counted)
    with pytest.raises(DataError, match="not among"):
        run.run(["robustness"])
    assert not seen


def test_logits_are_on_the_device_of_the_features(clip: Artifact, demo: Path) -> None:
    """Also if the head's weights are on another device."""
    run = evaluator(
        clip, demo, "eval.zero_shot={shards: heldout, classes: classes.txt}",
        "eval.linear_probe={train: gallery, test: heldout}",
    )  # fmt: skip
    for head in open_heads(run.sets):
        width = {"joint": 16, "backbone": run.sets.vision.vision.embed_dim}[head.space]
        assert head.logits(torch.rand(2, width)).shape == (2, round(1 / head.chance))
        if head.name == "zero_shot":  # a probe's logits are on the CPU
            assert head.logits(torch.rand(2, width, device="meta")).device.type == "meta"


def test_features_that_are_nan_are_refused(clip: Artifact, demo: Path) -> None:
    run = evaluator(clip, demo, "eval.retrieval.shards=heldout")
    run.sets.vision.vision.blocks[0].attn.qkv.weight.data[0, 0] = torch.nan
    with pytest.raises(DataError, match="features are NaN"):
        run.run(["retrieval"])
    run = evaluator(clip, demo, "eval.retrieval.shards=heldout")
    next(run.sets.joint.text_adapter.parameters()).data[0] = torch.nan
    with pytest.raises(DataError, match="text tower's features"):
        run.run(["retrieval"])
