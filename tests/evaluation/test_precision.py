"""bf16 of evaluation, probes, fine-tuning, tags and sidecars: close to fp32, and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import invoke
from torch import Tensor

from data_pipelines.shards.source import open_source
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, Tagger, VisionEncoder, data_of
from xray.config.identity import hash_json, identity
from xray.config.loading import build
from xray.evaluation.attentive_probe import AttentiveProbe
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.finetune import Classifier
from xray.precompute.config import FeaturesConfig
from xray.precompute.features import write_embeddings, write_scores

# bf16 keeps 8 bits: of a normalised feature, a few layers lose at most this. Tokens are not
# reduced, because rounding can change which ones are kept.
TOLERANCE = 0.03
BOTH: tuple[Any, Any] = ("fp32", "bf16")


def assert_close(fp32: Tensor, bf16: Tensor) -> None:
    """Require results in fp32 that differ by rounding only, and that do differ."""
    assert bf16.dtype == fp32.dtype == torch.float32
    assert 0 < (fp32 - bf16).abs().max() < TOLERANCE


def test_features_of_images_and_texts(control: Path, demo: Path) -> None:
    images, joint, texts = list[Tensor](), list[Tensor](), list[Tensor]()
    for precision in BOTH:
        encoder = Encoder(open_artifact(control))
        sets = Evaluator(encoder, EvalConfig(precision=precision), str(demo), 0).sets
        source = sets.open("zero_shot", "heldout", "image")
        images.append(sets.features(source).rows)
        joint.append(sets.features(source, "joint").rows)
        texts.append(sets.texts(["a red circle", "a blue star"]))
    for pair in (images, joint, texts):
        assert_close(*pair)


def test_probes_and_fine_tuning(control: Path) -> None:
    encoder = VisionEncoder(open_artifact(control))
    torch.manual_seed(0)
    logits, pixels = list[Tensor](), torch.rand(4, 1, 3, 32, 32)
    for precision in BOTH:
        encoder.precision = precision
        model = Classifier(encoder, 5, drop_path=0.0).eval()
        torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.manual_seed(0))
        logits.append(model(pixels).detach())
        loss = torch.nn.functional.cross_entropy(model(pixels), torch.arange(4))
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(g.dtype == torch.float32 for g in gradients)
    assert_close(*logits)
    probe, tokens, logits = AttentiveProbe(32, 2, 5).eval(), torch.randn(4, 9, 32), []
    state = probe.state_dict()
    for precision in BOTH:
        probe = AttentiveProbe(32, 2, 5, precision).eval()
        probe.load_state_dict(state)
        logits.append(probe(tokens).detach())
    assert_close(*logits)


def test_tags(tagger: Path) -> None:
    encoder = Tagger(open_artifact(tagger))
    encoder.choose(1.0)
    pixels, probabilities = torch.randint(256, (4, 1, 3, 32, 32)).byte(), list[Tensor]()
    for precision in BOTH:
        encoder.precision = precision
        probabilities.append(encoder.probabilities(pixels))
    assert_close(*probabilities)


@pytest.mark.parametrize("write", [write_embeddings, write_scores])
def test_a_sidecar_records_bf16_and_keeps_the_name_of_fp32(
    write: Any, control: Path, demo: Path
) -> None:
    artifact = open_artifact(control)
    source, encoder = open_source("heldout", str(demo / "heldout"), "image"), Encoder(artifact)
    (full, _), (half, _) = (
        write(source, encoder, FeaturesConfig(precision=precision, workers=0), data_of(artifact, 0))
        for precision in BOTH
    )
    assert "precision" not in full.facts and half.facts["precision"] == "bf16"
    assert full.name != half.name
    column = "embeddings" if write is write_embeddings else "score"
    tables = (torch.from_numpy(sidecar.table(0)[column].copy()) for sidecar in (full, half))
    assert_close(*tables)


def test_pseudo_tags_of_bf16_have_another_name(tagger: Path, demo: Path) -> None:
    names = []
    for more in ([], ["precision=fp32"], ["precision=bf16"]):
        arguments = ["data", "pseudo-tags", str(tagger), str(demo / "heldout"), "workers=0", *more]
        done = invoke(*arguments)
        assert done.exit_code == 0, done.output
        names.append(done.output.rpartition("hashtag.teacher=")[2].split()[0])
    assert names[0] == names[1] != names[2]


def test_eval_writes_its_precision_beside_the_results(
    control: Path, demo: Path, tmp_path: Path
) -> None:
    found = {}
    for precision in BOTH:
        out = tmp_path / f"{precision}.json"
        arguments = [f"data.root={demo}", "data.workers=0", f"eval.precision={precision}"]
        arguments += ["eval.knn={train: gallery, test: heldout, k: 5}", "--out", str(out)]
        done = invoke("eval", str(control), *arguments)
        assert done.exit_code == 0, done.output
        found[precision] = json.loads(out.read_text())
    assert list(found["fp32"]) == ["knn"] and list(found["bf16"]) == ["precision", "knn"]
    assert found["bf16"]["precision"] == "bf16"
    done = invoke("eval", str(control), "eval.precision=fp16")
    assert done.exit_code == 2 and "eval.precision" in done.stderr


def test_the_default_does_not_change_the_hash_of_older_settings() -> None:
    settings = EvalConfig()
    assert "precision" not in identity(settings)
    assert identity(EvalConfig(precision="bf16"))["precision"] == "bf16"
    assert hash_json(identity(settings)) == hash_json(identity(build(EvalConfig, {})))
