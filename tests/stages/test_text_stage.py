"""The text stage: hard negatives, text without images, languages, and caption retrieval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_process import invoke
from shards import jpeg, write_tar
from tiny import settings, train
from torch import Tensor

from data_pipelines.shards.source import Sample, open_source
from stages.base import Parents
from stages.text import TextModule, TextStage
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import Encoder, data_of
from xray.errors import ConfigError, DataError
from xray.evaluation.feature_extraction import extract, read_all_captions
from xray.evaluation.retrieval import caption_retrieval, retrieval
from xray.evaluation.suites import result_table
from xray.training.metrics import read_metrics

OTHERS = "data.sources.pairs={shards: pairs, modality: text}"
BLOCKS = "data.blocks=[{source: pairs, samples: 8}]"


def texts(root: Path, rows: list[dict[str, Any]], endings: tuple[str, ...] = ("json",)) -> None:
    """Write a shard of samples with only a json file to root/pairs."""
    (root / "pairs").mkdir(parents=True)
    files = {f"{i}.json": json.dumps(row).encode() for i, row in enumerate(rows)}
    write_tar(root / "pairs" / "0.tar", files)


def sample(row: dict[str, Any]) -> Sample:
    return Sample({"json": json.dumps(row).encode()}, "photos", "image", "k", 32, 4)


def loss_by_pairs(
    first: Tensor, second: Tensor, wrong: Tensor, there: Tensor, tau: float
) -> Tensor:
    """Compute the loss of each caption against all others and all present negatives."""
    total = torch.zeros((), dtype=torch.float64)
    extra = wrong[there > 0]
    for a, b in ((first, second), (second, first)):
        logits = torch.cat([a @ b.t(), a @ extra.t()], dim=1) / tau
        total += F.cross_entropy(logits, torch.arange(len(a)))
    return total / 2


def test_negatives_match_no_caption_and_missing_ones_are_ignored(
    demo: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    first, second = F.normalize(torch.randn(2, 5, 8, dtype=torch.float64), dim=-1)
    wrong = F.normalize(torch.randn(5, 3, 8, dtype=torch.float64), dim=-1)
    there = (torch.rand(5, 3) > 0.4).double()
    module = TextModule(torch.nn.Identity(), 0.1)  # type: ignore[arg-type]
    given = {"first": first, "second": second, "negatives": wrong, "there": there}
    for value in (first, second, wrong):
        value.requires_grad_()
    loss = module.loss_from_features(given).loss
    expected = loss_by_pairs(first, second, wrong, there, 0.1)
    assert torch.allclose(loss, expected, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(loss, [first, second, wrong]),
        torch.autograd.grad(expected, [first, second, wrong]),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_a_sample_gives_its_captions_and_negatives(demo: Path, tmp_path: Path) -> None:
    config = settings("text", demo, tmp_path, "text.negatives=wrong", "text.negatives_each=2")
    stage = TextStage(config)
    stage.prepare({}, Parents())
    row = {"captions": ["a red circle", "one round thing"], "wrong": ["a blue star"]}
    tokens = stage.transform(sample(row), None)
    lengths = tokens["attention_mask"].sum(dim=1)
    assert tokens["input_ids"].shape[0] == 4 and (lengths[:3] > 0).all() and lengths[3] == 0
    batch = stage.collate([tokens, stage.transform(sample({**row, "wrong": []}), None)])
    module = stage.build(Parents())
    features = module.features(batch, 0.0)
    assert features["there"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    loss = module.loss_from_features(features).loss  # type: ignore[arg-type]
    loss.backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_training_with_negatives_is_the_same_for_a_split_block(demo: Path, tmp_path: Path) -> None:
    things = [(c, s) for c in ("red", "blue", "green") for s in ("star", "dot", "box")]
    rows = [
        {"captions": [f"a {c} {s}", f"one {s}, {c}"], "wrong": [f"a {s} and a {c}"][: i % 3]}
        for i, (c, s) in enumerate(things)
    ]
    texts(tmp_path, rows)
    common = (OTHERS, BLOCKS, "text.negatives=wrong", f"text.llm={demo / 'llm'}")
    common += ("train.samples=32", "optim.base_lr=0.1")
    train("text", tmp_path, tmp_path / "whole", *common)
    train("text", tmp_path, tmp_path / "split", *common, "train.micro_batch=2")
    whole, split = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "split"))
    assert [r["loss"] for r in split] == pytest.approx([r["loss"] for r in whole], rel=2e-4)
    assert whole[-1]["loss"] < whole[0]["loss"]


def test_other_stages_refuse_text_without_images(demo: Path, tmp_path: Path) -> None:
    texts(tmp_path, [{"captions": ["a", "b"]}] * 8)
    with pytest.raises(ConfigError, match=r"stage mae cannot use source 'pairs' of modality text"):
        train("mae", tmp_path, tmp_path / "mae", OTHERS, BLOCKS)


def test_settings_that_match_no_data_are_refused_by_key(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text.negatives=wrnog: none of the samples"):
        train("text", demo, tmp_path / "a", "text.negatives=wrnog")
    for stage in ("text", "clip"):
        with pytest.raises(DataError, match=r"none of the first \d+ samples of source 'photos'"):
            train(stage, demo, tmp_path / stage, "data.sources.photos.captions={captoins: 1}")


def test_a_prompt_other_than_the_parents_is_refused(demo: Path, tmp_path: Path) -> None:
    blocks = "data.blocks=[{source: photos, samples: 8}]"
    tuned = train("text", demo, tmp_path / "text", blocks, "train.samples=8", "text.prompt=look at")
    with pytest.raises(ConfigError, match=r"text.prompt='see' cannot be: .* was made"):
        train("clip", demo, tmp_path / "b", "text.prompt=see", init_from=[tuned.path])
    made = train("clip", demo, tmp_path / "c", "train.samples=12", init_from=[tuned.path])
    assert made.manifest["config"]["text"]["prompt"] == "look at"


def test_captions_in_several_languages_form_pairs(demo: Path, tmp_path: Path) -> None:
    """Captions come from a nested field per language, or from texts with a language each."""
    row = {"captions": {"en": "a red circle", "de": "ein roter Kreis"}}
    fields = "data.sources.photos.captions={captions.en: 1, captions.de: 1}"
    stage = TextStage(settings("text", demo, tmp_path, fields))
    stage.prepare({}, Parents())
    pair = stage.transform(sample(row), None)["input_ids"]
    labelled = {"captions": [{"text": t, "language": k} for k, t in row["captions"].items()]}
    other = TextStage(settings("text", demo, tmp_path))
    other.prepare({}, Parents())
    assert torch.equal(pair, other.transform(sample(labelled), None)["input_ids"])


def test_caption_retrieval_on_a_small_example() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.8, 0.2], [0, 1]]), dim=-1)
    owner = torch.tensor([0, 0, 1, 1, 2])
    scores = caption_retrieval(vectors, owner)
    # 0 -> 1 right; 1 -> 0 or 3; 2 -> 4 wrong; 3 -> 1 wrong; 4 has no partner
    nearest_of_1 = vectors[1] @ vectors[0] > vectors[1] @ vectors[3]
    assert scores["top1"] == pytest.approx((1 + float(nearest_of_1)) / 4)
    assert scores["chance_top1"] == pytest.approx(1 / 4) and scores["captions"] == 5
    same = caption_retrieval(torch.ones(6, 2), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert same["top1"] == pytest.approx(1 / 5)  # collapsed features score at chance
    with pytest.raises(DataError, match="two captions"):
        caption_retrieval(torch.ones(3, 2), torch.arange(3))


def test_tuning_improves_caption_retrieval(demo: Path, tmp_path: Path) -> None:
    more = ("text.tune=full", "text.lora_rank=0", "train.samples=192", "optim.base_lr=0.02")
    blocks = "data.blocks=[{source: photos, samples: 32}]"
    tuned: Artifact = train("text", demo, tmp_path / "text", *more, blocks)
    asked = ["eval", str(tuned.path), "eval.captions.shards=heldout", f"data.root={demo}"]
    done = invoke(*asked, "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "r.json").read_text())["captions"]
    assert results["top1"] > results["before_top1"] > 0 and "before tuning" in done.output
    (demo / "llm").rename(demo / "moved")  # without the base LLM, only the tuned score is shown
    try:
        again = invoke(*asked)
        assert again.exit_code == 0 and "before tuning" not in again.output
    finally:
        (demo / "moved").rename(demo / "llm")


def test_video_retrieval_equals_retrieval_over_extracted_features(
    demo: Path, tmp_path: Path
) -> None:
    clip = train("clip", demo, tmp_path / "clip", "train.samples=24", "clip.matryoshka=[4]")
    asked = ["eval", str(clip.path), f"data.root={demo}", "eval.video_retrieval.shards=clips"]
    done = invoke(*asked, "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0 and "text to clip R@1" in done.output, done.output
    results = json.loads((tmp_path / "r.json").read_text())["video_retrieval"]
    titles = [row[0] for row in result_table({"video_retrieval": results}).rows]
    assert "clip to text R@5" in titles and "clip to text R@5, first 4 features" in titles
    source, encoder = open_source("s", "clips", "video", str(demo)), Encoder(clip)
    images = extract(source, encoder.encode_pixels, data_of(clip, 0)).rows
    captions = read_all_captions(source)
    texts = encoder.encode_text([caption for own in captions for caption in own])
    owner = torch.tensor([n for n, own in enumerate(captions) for _ in own])
    cut = [F.normalize(rows[:, :4], dim=-1) for rows in (images, texts)]
    for ending, rows in (("", (images, texts)), ("/4", cut)):
        for name, value in retrieval(*rows, owner).items():
            if name.startswith(("text_to", "image_to")):
                assert results[name + ending] == pytest.approx(value)
    assert len({results["text_to_image_R@10"], results["text_to_image_R@10/4"]}) == 2

    for more in (["--suite", "captions"], []):
        only = [*asked[:3], "eval.captions.shards=photos", *more]
        wrong = invoke(*only)
        assert wrong.exit_code == 2 and "is of stage clip" in wrong.stderr
    assert "it can be asked for zero_shot, retrieval" in " ".join(wrong.stderr.split())


def test_samples_without_media_are_counted_as_text(tmp_path: Path) -> None:
    files = {"0.jpg": jpeg(), "0.txt": b"a", "1.txt": b"b"}
    write_tar(tmp_path / "0.tar", files)
    done = invoke("data", "index", str(tmp_path))
    assert "1 image, 0 clips, 2 samples with text" in done.output
