"""Losses of the clip stage, against formulas in float64 and against unsplit blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clip_runs import PREFIXES, SIGMOID, TWO, State, assert_same_training, module_of, rows_of
from tiny import QUICK, settings, train
from torch import Tensor

from stages.clip import ClipModule
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder
from xray.optim import parameter_groups


def test_scale_and_bias_have_initial_values_and_their_own_group(demo: Path, tmp_path: Path) -> None:
    overrides = (SIGMOID, "optim.logit_scale_lr=0.25", "optim.weight_decay=0.3")
    config = settings("clip", demo, tmp_path, *overrides)
    module = ClipModule(config, None, 8)
    assert module.logit_bias is not None and module.logit_bias.item() == pytest.approx(-math.log(8))
    assert module.logit_scale.exp().item() == pytest.approx(10)
    groups = parameter_groups(module, config.optim)
    alone = [g for g in groups if g["lr_scale"] != 1]
    assert [(g["lr_scale"], g["weight_decay"]) for g in alone] == [(0.25, 0.0)]
    own = {id(module.logit_scale), id(module.logit_bias)}
    assert {id(p) for p in alone[0]["params"]} == own
    usual = parameter_groups(module, dataclasses.replace(config.optim, logit_scale_lr=1.0))
    assert [{id(p) for p in g["params"]} & own for g in usual].count(own) == 1
    assert own in [{id(p) for p in g["params"]} for g in usual]  # even with the same learning rate
    videos = module_of(demo, tmp_path, SIGMOID, "data.modalities=[video]")
    assert videos.logit_bias is not None and videos.logit_bias.item() == pytest.approx(-math.log(4))
    given = module_of(demo, tmp_path, SIGMOID, "clip.logit_bias=-3", "clip.logit_scale=2")
    assert given.logit_bias is not None and given.logit_bias.item() == -3
    assert given.logit_scale.exp().item() == pytest.approx(2)
    softmax = module_of(demo, tmp_path)
    assert softmax.logit_bias is None
    assert softmax.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_sigmoid_loss_trains_and_its_artifact_encodes(demo: Path, tmp_path: Path) -> None:
    artifact = train("clip", demo, tmp_path, SIGMOID, "train.samples=240")
    logged = rows_of(tmp_path)
    losses = [row["loss"] for row in logged]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.97 * sum(losses[:4])
    assert logged[0]["photos/logit_scale"] == pytest.approx(10)
    head = artifact.load("head")
    assert head["logit_bias"].item() != pytest.approx(-math.log(8), abs=1e-4)
    encoder = Encoder(artifact)
    assert torch.equal(encoder.logit_scale, head["logit_scale"].exp())
    pixels = torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8)
    image, text = encoder.encode_pixels(pixels), encoder.encode_text(["a red circle", "a star"])
    assert image.shape == (3, 16) and text.shape == (2, 16)
    for rows in (image, text):
        assert torch.allclose(rows.norm(dim=-1), torch.ones(len(rows)), atol=1e-5)
    more = (*QUICK, SIGMOID, "train.samples=12")
    child = train("clip", demo, tmp_path / "next", *more, init_from=[artifact.path])
    assert child.load("head").keys() == head.keys()


def test_scale_and_bias_do_not_move_at_learning_rate_0(clip_run: Callable[..., Path]) -> None:
    head = open_artifact(clip_run(SIGMOID, "optim.logit_scale_lr=0") / "artifact").load("head")
    assert head["logit_scale"].item() == pytest.approx(math.log(10), abs=1e-7)
    assert head["logit_bias"].item() == pytest.approx(-math.log(8), abs=1e-7)
    moved = open_artifact(clip_run(SIGMOID) / "artifact").load("head")
    assert all(abs(moved[n] - head[n]) > 1e-4 for n in ("logit_scale", "logit_bias"))


@pytest.mark.parametrize(
    ("options", "zero"),
    [
        ((SIGMOID,), 0),
        ((SIGMOID, TWO, PREFIXES), 0),
        ((SIGMOID, TWO, PREFIXES), 3),
        ((TWO, PREFIXES), 0),
    ],
)
def test_a_split_block_trains_as_the_whole(
    clip_run: Callable[..., Path], options: tuple[str, ...], zero: int
) -> None:
    whole = clip_run(*options)
    split = clip_run(*options, "train.micro_batch=2", f"zero.stage={zero}")
    assert_same_training(whole, split, 4)
    heads = [open_artifact(folder / "artifact").load("head") for folder in (whole, split)]
    assert heads[0].keys() == heads[1].keys()
    for name in ("logit_scale", "logit_bias"):
        if name in heads[0]:
            assert torch.allclose(heads[0][name], heads[1][name], rtol=1e-5), name


def test_a_split_block_trains_as_the_whole_in_bf16(clip_run: Callable[..., Path]) -> None:
    """Matrix products of another size round differently, so only 8 mantissa bits agree."""
    overrides = (SIGMOID, TWO, "train.precision=bf16")
    whole, split = (rows_of(clip_run(*overrides, f"train.micro_batch={size}")) for size in (0, 2))
    for a, b in zip(whole, split, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-2)


def test_features_and_metrics_are_fp32_under_autocast(demo: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = module_of(demo, tmp_path).eval()
    pixels = torch.randint(0, 256, (64, 1, 3, 32, 32), dtype=torch.uint8)
    batch = {"pixels": pixels, "sentences": torch.randn(64, 1, 8)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = module(batch, 0.5, "features")
        inside = module.loss_from_features(features)
    assert {value.dtype for value in features.values()} == {torch.float32}
    for name in ("image", "text"):
        assert torch.allclose(features[name].norm(dim=-1), torch.tensor(1.0), atol=1e-6)
    outside = module.loss_from_features(features)
    assert torch.allclose(inside.loss, outside.loss, rtol=1e-6)
    for name, value in outside.metrics.items():
        assert inside.metrics[name].dtype == torch.float32
        assert torch.allclose(inside.metrics[name], value, rtol=1e-6), name


def loss_by_hand(kind: str, features: State, sizes: list[int]) -> Tensor:
    """Compute the loss pair by pair, averaged over the prefixes in `sizes`."""
    image, text = features["image"], features["text"]
    samples, captions = text.shape[:2]
    own = [range(i * captions, (i + 1) * captions) for i in range(samples)]
    losses = []
    for size in sizes:
        pictures = [row[:size] / row[:size].square().sum().sqrt() for row in image]
        texts = [row[:size] / row[:size].square().sum().sqrt() for row in text.flatten(0, 1)]
        logits = features["logit_scale"] * torch.stack(
            [torch.stack([picture @ one for one in texts]) for picture in pictures]
        )
        terms = []
        if kind == "sigmoid":
            logits = logits + features["logit_bias"]
            for i in range(samples):
                for k in range(len(texts)):
                    right = torch.sigmoid(logits[i, k])
                    terms.append(-torch.log(right if k in own[i] else 1 - right) / len(texts))
        else:
            for i in range(samples):
                likely = logits[i].exp() / logits[i].exp().sum()
                terms += [-likely[k].log() / captions / samples / 2 for k in own[i]]
                for k in own[i]:
                    likely = logits[:, k].exp() / logits[:, k].exp().sum()
                    terms.append(-likely[i].log() / len(texts) / 2)
        losses.append(torch.stack(terms).sum())
    return torch.stack(losses).sum() / len(sizes)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("captions", [1, 2, 3])
@pytest.mark.parametrize("prefixes", [[], [4, 8]])
def test_losses_and_gradients_equal_the_formula(
    demo: Path, tmp_path: Path, kind: str, captions: int, prefixes: list[int]
) -> None:
    overrides = (f"clip.loss={kind}", f"clip.captions={captions}", f"clip.matryoshka={prefixes}")
    module = module_of(demo, tmp_path, *overrides)
    torch.manual_seed(captions)
    rows = {
        "image": F.normalize(torch.randn(5, 16, dtype=torch.float64), dim=-1),
        "text": F.normalize(torch.randn(5, captions, 16, dtype=torch.float64), dim=-1),
        "logit_scale": torch.tensor(7.0, dtype=torch.float64),
        "logit_bias": torch.tensor(-1.5, dtype=torch.float64),
    }
    used = list(rows)[: 4 if kind == "sigmoid" else 3]
    leaves = [rows[name].requires_grad_() for name in used]
    output = module.loss_from_features(rows)
    expected = loss_by_hand(kind, rows, [*prefixes, 16])
    assert torch.allclose(output.loss, expected, atol=1e-12)
    mine, theirs = (torch.autograd.grad(x, leaves) for x in (output.loss, expected))
    for name, a, b in zip(used, mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10), name
    cosines = rows["image"] @ rows["text"][:, 0].t()  # with each sample's first caption
    assert torch.allclose(output.metrics["positive_cosine"], cosines.diagonal().mean())
    assert torch.allclose(output.metrics["mean_cosine"], cosines.mean())
    right = sum(int(row.argmax()) == i for i, row in enumerate(cosines))
    assert output.metrics["top1"].item() == pytest.approx(right / 5)


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("prefixes", [[], [4]])
def test_loss_at_chance_is_the_loss_of_identical_features(
    demo: Path, tmp_path: Path, captions: int, prefixes: list[int]
) -> None:
    overrides = (f"clip.captions={captions}", f"clip.matryoshka={prefixes}")
    same = F.normalize(torch.ones(6, 16, dtype=torch.float64), dim=-1)
    features = {"image": same, "text": same[:, None].expand(-1, captions, -1)}
    features["logit_scale"] = torch.tensor(10.0, dtype=torch.float64)
    module = module_of(demo, tmp_path, *overrides)
    chance = module.options.chance(6)
    assert module.loss_from_features(features).loss.item() == pytest.approx(chance, abs=1e-12)

    module = module_of(demo, tmp_path, *overrides, SIGMOID)
    low, high = -30.0, 0.0
    for _ in range(60):  # ternary search: the loss is convex in the bias
        thirds = [low + (high - low) / 3, high - (high - low) / 3]
        biases = [torch.tensor(third, dtype=torch.float64) for third in thirds]
        losses = [
            module.loss_from_features({**features, "logit_bias": bias}).loss.item()
            for bias in biases
        ]
        low, high = (low, thirds[1]) if losses[0] < losses[1] else (thirds[0], high)
    assert losses[0] == pytest.approx(module.options.chance(6), abs=1e-9)
    assert module.options.chance(1) == 0
