"""Gradient cache: a block split into micro-batches trains as the whole block."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALL_TOKENS, train
from torch import Tensor, nn

from data_pipelines.stream.sampling import MicroBatch
from stages.base import StepOutput
from xray.models.backbone import VisionBackbone
from xray.models.text_tower import TextTower
from xray.training import accumulation
from xray.training.gradient_cache import CachedLoss, cached_losses, schedule, surrogate_loss
from xray.training.metrics import read_metrics

PLAIN = (ALL_TOKENS, "model.drop_path=0.0", "train.samples=48", "train.save_every=0")


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("whole")
    for stage in ("clip", "text"):
        blocks = [] if stage == "clip" else ["data.blocks=[{source: photos, samples: 8}]"]
        tune = ["text.tune=lora", "text.lora_rank=2", "text.lora_dropout=0.0"]
        train(stage, demo, out / stage, *PLAIN, *blocks, *tune)
    return {stage: out / stage for stage in ("clip", "text")}


@pytest.mark.parametrize(
    ("stage", "zero"), [("clip", 0), ("clip", 1), ("clip", 2), ("clip", 3), ("text", 0)]
)
def test_a_split_block_trains_as_the_whole(
    demo: Path, whole: dict[str, Path], tmp_path: Path, stage: str, zero: int
) -> None:
    blocks = [] if stage == "clip" else ["data.blocks=[{source: photos, samples: 8}]"]
    tune = ["text.tune=lora", "text.lora_rank=2", "text.lora_dropout=0.0"]
    cut = ("train.micro_batch=2", f"zero.stage={zero}")
    train(stage, demo, tmp_path, *PLAIN, *blocks, *tune, *cut)
    mine, theirs = (read_metrics(p / "metrics.jsonl") for p in (tmp_path, whole[stage]))
    assert len(mine) == len(theirs) >= 4
    for a, b in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), (name, a["step"])


LORA = ("text.tune=lora", "text.lora_rank=2", "text.lora_dropout=0.2")
FROZEN_TEXT, FROZEN_VISION = "text.tune=none", "optim.vision.freeze=1"


@pytest.mark.parametrize(
    ("overrides", "vision", "text"),
    [
        ((FROZEN_TEXT, "train.micro_batch=2"), 2 * 24, 24),
        ((FROZEN_TEXT, "train.micro_batch=2", "train.precision=bf16"), 2 * 24, 24),
        # blocks of 8 photos and 4 clips, of which only the first is split
        ((FROZEN_TEXT, "train.micro_batch=4", "zero.stage=3"), 2 * 8 + 4, 8 + 4),
        ((*LORA, "optim.text.freeze=0.5", "train.micro_batch=2"), 2 * 24, 12 + 2 * 12),
        # The random choice of visible tokens comes before LoRA's dropout.
        ((*LORA, FROZEN_VISION, "clip.mask_ratio=0.5", "train.micro_batch=2"), 24, 2 * 24),
    ],
)
def test_a_frozen_tower_runs_once_per_micro_batch(
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    vision: int,
    text: int,
) -> None:
    """Running it again, as a trained tower, gives the same bits."""
    calls: Counter[str] = Counter()
    for tower in (VisionBackbone, TextTower):

        def spy(self: Any, *args: Any, forward: Any = tower.forward, **more: Any) -> Any:
            calls[type(self).__name__] += 1
            return forward(self, *args, **more)

        monkeypatch.setattr(tower, "forward", spy)
    once = train("clip", demo, tmp_path / "once", *PLAIN, *overrides)
    assert calls == {"VisionBackbone": vision, "TextTower": text}

    def without_constants(*args: Any) -> list[CachedLoss]:
        return [dataclasses.replace(each, constants={}) for each in cached_losses(*args)]

    monkeypatch.setattr(accumulation, "cached_losses", without_constants)
    twice = train("clip", demo, tmp_path / "twice", *PLAIN, *overrides)
    assert calls.total() > 2 * (vision + text)
    mine, theirs = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("once", "twice"))
    for a, b in zip(mine, theirs, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    for part in ("backbone", "head", "text"):
        a, b = once.load(part), twice.load(part)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("clip", (FROZEN_TEXT,)),
        ("clip", (*LORA, "text.lora_dropout=0.0", "clip.captions=2", "clip.loss=sigmoid")),
        ("text", ("data.blocks=[{source: photos, samples: 8}]",)),
    ],
)
def test_captions_bucketed_by_length_train_alike_with_less_padding(
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    overrides: tuple[str, ...],
) -> None:
    tokens: Counter[str] = Counter()
    forward = TextTower.forward

    def spy(self: Any, input_ids: Tensor, attention_mask: Tensor, pooled_mask: Tensor) -> Tensor:
        tokens["all"] += input_ids.numel()
        tokens["read"] += int(attention_mask.sum())
        return forward(self, input_ids, attention_mask, pooled_mask)

    monkeypatch.setattr(TextTower, "forward", spy)
    val = (
        "data.sources.heldout={shards: heldout, modality: image}",
        "data.validation=[{source: heldout, samples: 8}]",
    )
    common = (*PLAIN, *overrides, *val, "text.max_length=64", "train.micro_batch=2")
    counts = []
    for name in ("usual", "bucketed"):
        tokens.clear()
        bucket = f"text.bucket_by_length={str(name == 'bucketed').lower()}"
        train(stage, demo, tmp_path / name, *common, bucket)
        counts.append(dict(tokens))
    usual, bucketed = counts
    assert bucketed["read"] == usual["read"] < bucketed["all"] < usual["all"]
    mine, theirs = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("bucketed", "usual"))
    assert "val/heldout/positive_cosine" in mine[-1]
    for a, b in zip(mine, theirs, strict=True):
        names = ("loss", "grad_norm", "photos/positive_cosine", "val/heldout/positive_cosine")
        for name in names:
            assert a.get(name) == pytest.approx(b.get(name), rel=1e-4, abs=1e-5), (name, a["step"])


class Contrastive(nn.Module):
    """Two linear towers and a loss that compares all samples of a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def features(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        towers = {"image": self.image(images), "text": self.text(texts)}
        return towers | {"scale": self.scale * 1, "teacher": torch.ones(len(images), 1)}

    def loss(self, features: dict[str, Tensor]) -> StepOutput:
        logits = features["scale"] * features["image"] @ features["text"].T
        return StepOutput(nn.functional.cross_entropy(logits, torch.arange(len(logits))), {})


def test_the_schedule_gives_the_gradients_of_the_whole_block() -> None:
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(8, width, generator=generator) for width in (6, 5))
    whole, split = Contrastive(), Contrastive()
    expected = whole.loss(whole.features(images, texts)).loss
    expected.backward()
    bounds = [(0, 3), (3, 6), (6, 8)]
    micros = [MicroBatch(0, "photos", start, stop, 1.0) for start, stop in bounds]
    rows, cached, kinds = [], [], []
    for each in schedule(micros, lambda _: True):
        kinds.append(each.kind)
        part = slice(*bounds[each.numbers[0]])
        if each.kind == "features":
            with torch.no_grad():
                rows.append(split.features(images[part], texts[part]))
        elif each.kind == "loss":
            cached = cached_losses(split.loss, rows, training=True)
        else:
            features = split.features(images[part], texts[part])
            surrogate_loss(features, cached[each.numbers[0]].gradients).backward()
    assert kinds == ["features"] * 3 + ["loss"] + ["backward"] * 3
    assert all(torch.equal(each.output.loss, cached[0].output.loss) for each in cached)
    assert [len(each.constants["teacher"]) for each in cached] == [3, 3, 2]
    torch.testing.assert_close(cached[0].output.loss, expected.detach())
    for (name, mine), theirs in zip(split.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_a_block_is_cached_only_if_it_is_split_and_its_loss_spans_it() -> None:
    micros = [MicroBatch(block, "photos", 0, 2, 1.0) for block in (0, 1, 1)]
    plain = [("backward", (0,)), ("backward", (1,)), ("backward", (2,))]
    cached = [("features", (1,)), ("features", (2,)), ("loss", (1, 2))]
    for contrasts, expected in ((False, plain), (True, cached + plain)):
        found = schedule(micros, lambda _, answer=contrasts: answer)  # type: ignore[misc]
        passes = [(each.kind, each.numbers) for each in found]
        assert passes == expected
