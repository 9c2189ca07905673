"""What the clip stage can be asked for, each option against a truth of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shards import photo, write_tar
from tiny import ALL_TOKENS, settings, train
from torch import Tensor

from data_pipelines.shards.source import open_source
from data_pipelines.text.captions import Caption, choose_captions
from stages.base import Parents, StepOutput
from stages.clip import ClipModule, ClipStage
from stages.clip_config import ClipConfig, ClipOptions
from stages.clip_monitor import ContrastGuard
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder
from xray.config import BlockConfig
from xray.errors import ConfigError, TrainingError
from xray.models.backbone import VisionBackbone
from xray.models.patch_dropout import draw_visible, mask_ratio_at
from xray.models.text_tower import TextTower
from xray.optim import parameter_groups
from xray.training import engine as engine_module
from xray.training.accumulation import Accumulator
from xray.training.engine import Engine
from xray.training.metrics import read_metrics

QUICK = (ALL_TOKENS, "model.drop_path=0.0", "train.samples=48", "train.save_every=0")  # four steps
PHOTOS = "data.blocks=[{source: photos, samples: 8}]"
LORA = ("text.tune=lora", "text.lora_rank=2")
SIGMOID = "clip.loss=sigmoid"
TWO, PREFIXES = "clip.captions=2", "clip.matryoshka=[4,8]"

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def run(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of short runs of the clip stage by what was asked for, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = tmp_path_factory.mktemp("run")
            train("clip", demo, made[overrides], *QUICK, *overrides)
        return made[overrides]

    return folder


def rows_of(folder: Path) -> list[dict[str, float]]:
    return read_metrics(folder / "metrics.jsonl")


def assert_same_course(one: Path, two: Path, steps: int) -> None:
    mine, theirs = rows_of(one), rows_of(two)
    assert len(mine) == len(theirs) == steps
    for a, b in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm", "photos/logit_scale", "clips/logit_scale"):
            assert a[name] == pytest.approx(b[name], rel=2e-5), (name, a["step"])


def module_of(demo: Path, out: Path, *overrides: str) -> ClipModule:
    """A module that takes sentence vectors of width 8."""
    return ClipModule(settings("clip", demo, out, *overrides), None, 8)


def parts_equal(a: State, b: State, prefix: str = "") -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(prefix))


# the losses -----------------------------------------------------------------------------------


def test_scale_and_bias_start_right_in_a_group_of_their_own(demo: Path, tmp_path: Path) -> None:
    asked = (SIGMOID, "optim.logit_scale_lr=0.25", "optim.weight_decay=0.3")
    config = settings("clip", demo, tmp_path, *asked)
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
    assert own in [{id(p) for p in g["params"]} for g in usual]  # also where the lr is the same
    videos = module_of(demo, tmp_path, SIGMOID, "data.modalities=[video]")
    assert videos.logit_bias is not None and videos.logit_bias.item() == pytest.approx(-math.log(4))
    given = module_of(demo, tmp_path, SIGMOID, "clip.logit_bias=-3", "clip.logit_scale=2")
    assert given.logit_bias is not None and given.logit_bias.item() == -3
    assert given.logit_scale.exp().item() == pytest.approx(2)
    softmax = module_of(demo, tmp_path)
    assert softmax.logit_bias is None
    assert softmax.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_the_sigmoid_loss_trains_and_its_artifact_encodes(demo: Path, tmp_path: Path) -> None:
    artifact = train("clip", demo, tmp_path, SIGMOID, "train.samples=240")
    rows = rows_of(tmp_path)
    losses = [row["loss"] for row in rows]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.97 * sum(losses[:4])
    assert rows[0]["photos/logit_scale"] == pytest.approx(10)
    head = artifact.load("head")
    assert head["logit_bias"].item() != pytest.approx(-math.log(8), abs=1e-4)
    encoder = Encoder(artifact)
    assert torch.equal(encoder.logit_scale, head["logit_scale"].exp())
    pixels = torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8)
    image, text = encoder.encode_pixels(pixels), encoder.encode_text(["a red circle", "a star"])
    assert image.shape == (3, 16) and text.shape == (2, 16)
    for found in (image, text):
        assert torch.allclose(found.norm(dim=-1), torch.ones(len(found)), atol=1e-5)
    more = (*QUICK, SIGMOID, "train.samples=12")
    child = train("clip", demo, tmp_path / "next", *more, init_from=[artifact.path])
    assert child.load("head").keys() == head.keys()


def test_scale_and_bias_stay_where_their_lr_is_0(run: Callable[..., Path]) -> None:
    head = open_artifact(run(SIGMOID, "optim.logit_scale_lr=0") / "artifact").load("head")
    assert head["logit_scale"].item() == pytest.approx(math.log(10), abs=1e-7)
    assert head["logit_bias"].item() == pytest.approx(-math.log(8), abs=1e-7)
    moved = open_artifact(run(SIGMOID) / "artifact").load("head")
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
def test_a_cut_block_trains_as_the_whole(
    run: Callable[..., Path], options: tuple[str, ...], zero: int
) -> None:
    whole = run(*options)
    cut = run(*options, "train.micro_batch=2", f"zero.stage={zero}")
    assert_same_course(whole, cut, 4)
    heads = [open_artifact(folder / "artifact").load("head") for folder in (whole, cut)]
    assert heads[0].keys() == heads[1].keys()
    for name in ("logit_scale", "logit_bias"):
        if name in heads[0]:
            assert torch.allclose(heads[0][name], heads[1][name], rtol=1e-5), name


def test_a_cut_block_trains_as_the_whole_in_bf16(run: Callable[..., Path]) -> None:
    """Products of other sizes are rounded otherwise: 8 bits of mantissa agree."""
    asked = (SIGMOID, TWO, "train.precision=bf16")
    whole, cut = (rows_of(run(*asked, f"train.micro_batch={size}")) for size in (0, 2))
    for a, b in zip(whole, cut, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-2)


def test_features_and_metrics_are_whole_under_autocast(demo: Path, tmp_path: Path) -> None:
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


def by_hand(kind: str, features: State, sizes: list[int]) -> Tensor:
    """The loss pair by pair, of each prefix by itself, captions sample by sample."""
    image, text = features["image"], features["text"]
    samples, captions = text.shape[:2]
    own = [range(i * captions, (i + 1) * captions) for i in range(samples)]
    found = []
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
        found.append(torch.stack(terms).sum())
    return torch.stack(found).sum() / len(sizes)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("captions", [1, 2, 3])
@pytest.mark.parametrize("prefixes", [[], [4, 8]])
def test_losses_and_gradients_are_those_by_hand(
    demo: Path, tmp_path: Path, kind: str, captions: int, prefixes: list[int]
) -> None:
    asked = (f"clip.loss={kind}", f"clip.captions={captions}", f"clip.matryoshka={prefixes}")
    module = module_of(demo, tmp_path, *asked)
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
    expected = by_hand(kind, rows, [*prefixes, 16])
    assert torch.allclose(output.loss, expected, atol=1e-12)
    mine, theirs = (torch.autograd.grad(x, leaves) for x in (output.loss, expected))
    for name, a, b in zip(used, mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10), name
    cosines = rows["image"] @ rows["text"][:, 0].t()  # to each sample's first caption
    assert torch.allclose(output.metrics["positive_cosine"], cosines.diagonal().mean())
    assert torch.allclose(output.metrics["mean_cosine"], cosines.mean())
    right = sum(int(row.argmax()) == i for i, row in enumerate(cosines))
    assert output.metrics["top1"].item() == pytest.approx(right / 5)


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("prefixes", [[], [4]])
def test_chance_is_the_loss_of_features_that_are_all_alike(
    demo: Path, tmp_path: Path, captions: int, prefixes: list[int]
) -> None:
    asked = (f"clip.captions={captions}", f"clip.matryoshka={prefixes}")
    same = F.normalize(torch.ones(6, 16, dtype=torch.float64), dim=-1)
    features = {"image": same, "text": same[:, None].expand(-1, captions, -1)}
    features["logit_scale"] = torch.tensor(10.0, dtype=torch.float64)
    module = module_of(demo, tmp_path, *asked)
    chance = module.options.chance(6)
    assert module.loss_from_features(features).loss.item() == pytest.approx(chance, abs=1e-12)

    module = module_of(demo, tmp_path, *asked, SIGMOID)
    low, high = -30.0, 0.0
    for _ in range(60):  # the loss is convex in the bias: thirds that cannot hold the best go
        thirds = [low + (high - low) / 3, high - (high - low) / 3]
        biases = [torch.tensor(third, dtype=torch.float64) for third in thirds]
        losses = [
            module.loss_from_features({**features, "logit_bias": bias}).loss.item()
            for bias in biases
        ]
        low, high = (low, thirds[1]) if losses[0] < losses[1] else (thirds[0], high)
    assert losses[0] == pytest.approx(module.options.chance(6), abs=1e-9)
    assert module.options.chance(1) == 0


# captions -------------------------------------------------------------------------------------


def test_captions_of_a_sample_are_its_own_and_differ(demo: Path, tmp_path: Path) -> None:
    texts = [
        ["a red circle", "a small star", "a large ring"],
        ["a blue cross"],
        ["a green square", "a picture of a pink star on the left"],
    ]
    files: dict[str, bytes] = {}
    for number, captions in enumerate(texts):
        files[f"{number}.jpg"] = photo(number)
        files[f"{number}.json"] = json.dumps({"captions": captions}).encode()
    write_tar(tmp_path / "0.tar", files)
    stage = ClipStage(
        settings("clip", demo, tmp_path, TWO, f"data.sources.photos.shards={tmp_path}")
    )
    source = open_source("photos", str(tmp_path), "image")
    stage.prepare({"photos": source}, Parents())
    seen: Counter[tuple[str, ...]] = Counter()
    for seed in (None, *range(30)):
        rng = None if seed is None else np.random.default_rng(seed)
        batch = stage.collate([stage.transform(source.sample(0, m, 32, 4), rng) for m in range(3)])
        assert batch["input_ids"].shape[:2] == (3, 2)
        for own, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
            decode = stage.language.tokenizer.tokenizer.decode
            found = [decode(i[m.bool()]).strip() for i, m in zip(ids, mask, strict=True)]
            assert set(found) <= set(own) and len(set(found)) == min(2, len(own))
            seen[tuple(found)] += seed is not None
            assert seed is not None or found == (own * 2)[:2]  # without randomness the first
    assert len(seen) == 6 + 1 + 2  # all pairs, in both orders


def test_no_caption_comes_twice_before_all_came() -> None:
    captions = [Caption(str(n), weight, "", n) for n, weight in enumerate((5.0, 1.0, 0.2, 2.0))]
    for seed in range(50):
        drawn = [c.number for c in choose_captions(captions, np.random.default_rng(seed), 11)]
        assert len(drawn) == 11
        for start in (0, 4, 8):
            group = drawn[start : start + 4]
            assert len(set(group)) == len(group)
    one = choose_captions(captions[:1], np.random.default_rng(0), 3)
    assert [c.number for c in one] == [0, 0, 0]
    assert [c.number for c in choose_captions(captions, None, 6)] == [0, 1, 2, 3, 0, 1]


def test_captions_are_drawn_by_weight() -> None:
    weights, times = [4.0, 2.0, 1.0, 1.0], 4000
    captions = [Caption(str(n), weight, "", n) for n, weight in enumerate(weights)]
    p = [weight / sum(weights) for weight in weights]
    rng = np.random.default_rng(1)
    pairs = Counter(
        frozenset(c.number for c in choose_captions(captions, rng, 2)) for _ in range(times)
    )
    expected = {
        frozenset((i, j)): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        for i in range(4)
        for j in range(i)
    }
    assert sum(expected.values()) == pytest.approx(1) and pairs.keys() == expected.keys()
    chi = sum((pairs[k] - times * v) ** 2 / (times * v) for k, v in expected.items())
    assert chi < 20.5  # 5 degrees of freedom, 1 in 1000
    for seed in range(200):  # one caption is what it always was, and takes one draw
        mine, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
        expected_number = theirs.choice(4, p=np.array(weights) / sum(weights))
        assert choose_captions(captions, mine)[0].number == expected_number
        assert mine.random() == theirs.random()


# patch dropout --------------------------------------------------------------------------------


def test_the_masked_share_rises_in_steps_and_ends() -> None:
    def at(progress: float) -> float:
        return mask_ratio_at(0.5, (0.2, 0.6), 0.9, progress)

    assert at(0.0) == at(0.19) == at(0.2) == 0
    for step in range(8):
        assert at(0.2 + 0.4 * (step + 0.5) / 8) == pytest.approx(0.5 * step / 8)
    assert at(0.6) == at(0.899) == 0.5  # exactly
    assert at(0.9) == at(1.0) == 0
    assert {at(i / 1000) for i in range(1000)} == {0.5 * step / 8 for step in range(9)}
    assert mask_ratio_at(0.5, (0.0, 0.0), 1.0, 0.0) == 0.5


@pytest.mark.parametrize("start", [0.3, 1.0])
def test_a_masked_share_without_a_ramp_comes_at_once(start: float) -> None:
    assert mask_ratio_at(0.5, (start, start), 1.1, start - 0.01) == 0
    assert mask_ratio_at(0.5, (start, start), 1.1, start) == 0.5


@pytest.mark.parametrize(("grid", "ratio", "kept"), [((2, 3, 4), 0.5, 6), ((3, 2, 6), 0.3, 8)])
def test_visible_places_are_distinct_and_uniform(
    grid: tuple[int, int, int], ratio: float, kept: int
) -> None:
    torch.manual_seed(0)
    (t, h, w), times = grid, 4000
    for per_slot in (True, False):
        places = draw_visible(grid, times, ratio, per_slot, torch.device("cpu"))
        number = t * kept if per_slot else round(t * h * w * (1 - ratio))
        assert places.shape == (times, number)
        assert all(len(set(row)) == number for row in places[:200].tolist())
        assert len({tuple(sorted(row)) for row in places[:50].tolist()}) > 40  # each its own
        counts = torch.bincount(places.flatten(), minlength=t * h * w)
        share = number / (t * h * w)
        assert len(counts) == t * h * w
        deviation = (counts - times * share) / math.sqrt(times * share * (1 - share))
        assert deviation.abs().max() < 4.5
        if per_slot:  # slot by slot
            assert torch.equal(places // (h * w), torch.arange(t).repeat_interleave(kept).expand(
                times, -1))  # fmt: skip
    few = draw_visible(grid, 3, 0.999, True, torch.device("cpu"))
    assert few.shape == (3, t)  # never none


@pytest.mark.parametrize(("video", "tokens"), [("joint", (16, 32)), ("frames", (16, 16))])
def test_the_backbone_sees_fewer_tokens_in_training_only(
    demo: Path, tmp_path: Path, video: str, tokens: tuple[int, int]
) -> None:
    asked = ("clip.mask_ratio=0.5", "clip.mask_until=0.9", f"model.video={video}")
    module = module_of(demo, tmp_path, *asked)
    seen: list[int] = []
    module.vision.blocks[0].register_forward_pre_hook(
        lambda block, given: seen.append(given[0].shape[1] - module.vision.num_prefix_tokens)
    )
    for frames, whole in zip((1, 4), tokens, strict=True):
        pixels = torch.randint(0, 256, (2, frames, 3, 32, 32), dtype=torch.uint8)
        batch = {"pixels": pixels, "sentences": torch.randn(2, 1, 8)}
        for training, progress, expected in (
            (True, 0.5, whole // 2),
            (True, 0.89, whole // 2),
            (True, 0.95, whole),
            (False, 0.5, whole),
        ):
            module.train(training)
            module(batch, progress).loss.backward()
            assert seen == [expected], (frames, training, progress)
            seen.clear()
    module.train()
    found = module._visible(pixels, 0.5)  # of the clips
    assert found is not None
    if video == "frames":  # as many of each frame, frame by frame
        assert torch.equal(found // 16, torch.arange(4).repeat_interleave(8).expand(2, -1))


def test_a_cut_block_masks_alike_in_both_passes(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn anew, and it trains as the whole block with the very same masks."""
    asked = (*QUICK, *LORA, "text.lora_dropout=0.0", "clip.mask_ratio=0.5", "clip.mask_until=0.8")
    drawn: list[Tensor | None] = []
    features: list[Any] = []
    visible, call = ClipModule._visible, Engine.__call__

    def spy_mask(self: ClipModule, *given: Any) -> Tensor | None:
        drawn.append(visible(self, *given))
        return drawn[-1]

    def spy_call(self: Engine, *given: Any) -> Any:
        features.append(call(self, *given))
        return features[-1]

    monkeypatch.setattr(ClipModule, "_visible", spy_mask)
    monkeypatch.setattr(Engine, "__call__", spy_call)
    train("clip", demo, tmp_path / "cut", *asked, "train.micro_batch=2")
    assert len(drawn) == len(features) == 4 * 2 * 6  # steps, passes, micro-batches
    masks: list[Tensor | None] = []
    for step in range(4):
        first, second = (range(12 * step + 6 * p, 12 * step + 6 * p + 6) for p in (0, 1))
        for a, b in zip(first, second, strict=True):
            for name in ("image", "text"):
                assert torch.allclose(features[a][name], features[b][name], atol=1e-6)
                assert features[b][name].requires_grad and not features[a][name].requires_grad
        found = [drawn[a] for a in first]
        if step == 3:  # progress 0.875
            assert found == [None] * 6
            masks += [None, None]
            continue
        own = [mask for mask in found if mask is not None]
        assert [mask.shape for mask in own] == [(2, 8)] * 4 + [(2, 16)] * 2
        assert not torch.equal(own[0], own[1])
        masks += [torch.cat(own[:4]), torch.cat(own[4:])]

    monkeypatch.setattr(Engine, "__call__", call)
    monkeypatch.setattr(ClipModule, "_visible", lambda *_: masks.pop(0))
    train("clip", demo, tmp_path / "whole", *asked)
    assert_same_course(tmp_path / "cut", tmp_path / "whole", 4)


# freezing -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Course:
    """What happened in a run: weights before it and after each step, and how towers were run."""

    states: list[State] = dataclasses.field(default_factory=list)
    optimized: set[str] = dataclasses.field(default_factory=set)
    vision: list[tuple[bool, bool]] = dataclasses.field(default_factory=list)  # training, grad
    text: list[tuple[bool, bool]] = dataclasses.field(default_factory=list)

    def moved(self, prefix: str) -> list[set[str]]:
        """For each step, which parameters differ from those before the run."""
        first = self.states[0]
        return [
            {n for n in first if n.startswith(prefix) and not torch.equal(state[n], first[n])}
            for state in self.states[1:]
        ]


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> Course:
    found = Course()
    start, after, make = Engine.__init__, ClipStage.after_step, engine_module.make_optimizer
    names: dict[int, str] = {}

    def spy_start(self: Engine, module: Any, config: Any) -> None:
        names.update({id(p): name for name, p in module.named_parameters()})
        start(self, module, config)
        found.states.append(self.state_dict())

    def spy_make(groups: Any, config: Any) -> Any:
        found.optimized |= {names[id(p)] for group in groups for p in group["params"]}
        return make(groups, config)

    def spy_after(self: ClipStage, engine: Engine, module: ClipModule) -> None:
        after(self, engine, module)
        found.states.append(engine.state_dict())

    def spy_tower(kind: Any, seen: list[tuple[bool, bool]]) -> None:
        forward = kind.forward

        def spy(self: Any, *given: Any, **more: Any) -> Any:
            seen.append((self.training, torch.is_grad_enabled()))
            return forward(self, *given, **more)

        monkeypatch.setattr(kind, "forward", spy)

    monkeypatch.setattr(Engine, "__init__", spy_start)
    monkeypatch.setattr(engine_module, "make_optimizer", spy_make)
    monkeypatch.setattr(ClipStage, "after_step", spy_after)
    spy_tower(VisionBackbone, found.vision)
    spy_tower(TextTower, found.text)
    return found


@pytest.mark.parametrize("zero", [0, 3])
def test_a_vision_tower_that_is_frozen_stays_its_parents(
    demo: Path, tmp_path: Path, run: Callable[..., Path], course: Course, zero: int
) -> None:
    parent = open_artifact(run() / "artifact")
    for seen in (course.states, course.vision, course.text, course.optimized):
        seen.clear()  # of the parent
    asked = ("optim.vision.freeze=1", "optim.weight_decay=0.5", f"zero.stage={zero}")
    child = train(
        "clip", demo, tmp_path, *QUICK, *asked, "model.drop_path=0.3", init_from=[parent.path]
    )
    assert parts_equal(parent.load("backbone"), child.load("backbone"))
    assert course.optimized and not any(n.startswith("towers.") for n in course.optimized)
    assert {"vision_projection.weight", "logit_scale"} <= course.moved("")[0]
    assert course.moved("towers.") == [set()] * 4
    assert child.load("head")["logit_scale"] != course.states[0]["logit_scale"]
    assert len(course.vision) == 8 and set(course.vision) == {(False, False)}


@pytest.mark.parametrize(("name", "zero"), [("adamw", 0), ("lion", 0), ("lion", 2)])
def test_a_vision_tower_is_held_for_half_of_the_run(
    demo: Path, tmp_path: Path, course: Course, name: str, zero: int
) -> None:
    asked = (f"optim.name={name}", "optim.weight_decay=0.5", f"zero.stage={zero}")
    train(
        "clip", demo, tmp_path, *QUICK, *asked,
        "optim.vision.freeze=0.5", "train.samples=72", "optim.base_lr=0.004",
    )  # fmt: skip
    moved = course.moved("towers.vision.")
    assert moved[:3] == [set()] * 3  # also not by weight decay, or by momentum
    own = {n for n in course.optimized if n.startswith("towers.vision.")}
    assert len(own) > 40 and moved[3] == moved[5] == own
    assert course.vision == [(False, False)] * 6 + [(True, True)] * 6
    assert all(step >= {"vision_projection.weight"} for step in course.moved(""))


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_stages_agree_on_towers_that_thaw(run: Callable[..., Path], zero: int) -> None:
    asked = ("optim.vision.freeze=0.5", *LORA, "text.lora_dropout=0.0", "optim.text.freeze=0.25")
    assert_same_course(run(*asked), run(*asked, f"zero.stage={zero}", "train.micro_batch=4"), 4)


@pytest.mark.parametrize("freeze", [0.5, 1])
def test_lora_can_be_held_too(demo: Path, tmp_path: Path, course: Course, freeze: float) -> None:
    asked = (*LORA, "text.lora_dropout=0.2", f"optim.text.freeze={freeze}")
    artifact = train("clip", demo, tmp_path, *QUICK, *asked)
    moved, text = course.moved("towers.text."), artifact.load("text")
    lora_b = [value for name, value in text.items() if ".lora_B." in name]
    assert lora_b and moved[:2] == [set(), set()]
    assert course.text[:4] == [(False, False)] * 4
    if freeze == 1:
        assert moved[3] == set() and not any(n.startswith("towers.text") for n in course.optimized)
        assert all(not value.any() for value in lora_b)
        assert course.text[4:] == [(False, False)] * 4
    else:
        assert all(value.any() for value in lora_b) and all(".lora_" in n for n in moved[3])
        assert course.text[4:] == [(True, True)] * 4
    assert course.vision == [(True, True)] * 8


@pytest.mark.parametrize(("freeze", "zero"), [(1, 0), (0.5, 2)])
def test_a_frozen_run_that_is_stopped_goes_on_as_if_it_was_not(
    demo: Path,
    tmp_path: Path,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    freeze: float,
    zero: int,
) -> None:
    asked = (f"optim.vision.freeze={freeze}", f"zero.stage={zero}", "train.samples=72")
    whole, after, calls = run(*asked), ClipStage.after_step, []

    def stop(self: ClipStage, *given: Any) -> None:
        after(self, *given)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ClipStage, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train("clip", demo, tmp_path, *QUICK, *asked, "train.save_every=2")
    artifact = train("clip", demo, tmp_path, *QUICK, *asked)
    assert len(calls) == 5 + 2  # from the checkpoint of step 4
    for name in ("backbone", "head"):
        assert parts_equal(artifact.load(name), open_artifact(whole / "artifact").load(name))


# guards ---------------------------------------------------------------------------------------

HEALTHY = {"loss": 2.0, "mean_cosine": 0.2, "positive_cosine": 0.6, "logit_scale": 20.0}
WRONG: dict[str, tuple[dict[str, float], list[str]]] = {
    "nothing is learned": ({"loss": math.log(128)}, ["debug.overfit_batch", "optim.base_lr"]),
    "are alike": (
        {"mean_cosine": 0.99, "positive_cosine": 0.995}, ["optim.base_lr", "optim.warmup"],
    ),
    "is at clip.logit_scale_max=100": ({"logit_scale": 100.0}, ["optim.logit_scale_lr"]),
    "logit_scale fell from 14.3 to 5.0": (
        {"logit_scale": 5.0}, ["optim.base_lr", "optim.logit_scale_lr", "clip.logit_scale"],
    ),
}  # fmt: skip


def guard_of(*blocks: tuple[str, int], **options: Any) -> ContrastGuard:
    return ContrastGuard([BlockConfig(*block) for block in blocks], ClipOptions(**options))


def logged(source: str = "photos", **changes: float) -> dict[str, float]:
    return {f"{source}/{name}": value for name, value in {**HEALTHY, **changes}.items()}


def assert_names_keys(message: str, keys: list[str]) -> None:
    """The message has these keys, and none that the config does not."""
    found = re.findall(r"\b(?:clip|data|debug|model|optim|train)\.[a-z_][a-z_.]*[a-z]", message)
    assert set(keys) <= set(found)
    for key in found:
        value: Any = ClipConfig()
        for name in key.split("."):
            value = getattr(value, name)


@pytest.mark.parametrize("what", WRONG)
def test_each_warning_comes_after_ten_looks_and_once(what: str) -> None:
    changes, keys = WRONG[what]
    guard, bad = guard_of(("photos", 128)), logged(**changes)
    for _ in range(30):
        assert guard.look(bad, 0.099) == []
    for _ in range(9):
        assert guard.look(bad, 0.1) == []
    assert guard.look(logged(), 0.2) == []  # an interruption
    for _ in range(9):
        assert guard.look(bad, 0.3) == []
    said = guard.look(bad, 0.4)
    assert len(said) == 1 and what in said[0]
    assert_names_keys(said[0], keys)
    for _ in range(12):
        assert guard.look(bad, 0.5) == []
    for _ in range(12):
        assert guard.look(logged(), 0.5) == []
    for _ in range(12):
        assert guard.look(bad, 0.6) == []  # it was said


def test_what_goes_well_is_left_alone() -> None:
    guard = guard_of(("photos", 128), ("clips", 64))
    for step in range(100):
        edges = logged("clips", mean_cosine=0.97, positive_cosine=0.985, loss=0.97 * math.log(64))
        scales = {"photos/logit_scale": 7.2 + step * 0.92}
        assert guard.look({**logged(), **edges, **scales}, step / 100) == []
    assert guard.look({}, 0.5) == []


def test_warnings_are_of_the_block_that_has_them_and_do_not_hide_each_other() -> None:
    guard = guard_of(("photos", 128), ("clips", 64))
    alike = logged("clips", mean_cosine=0.99, positive_cosine=0.99)
    for _ in range(9):
        assert guard.look({**logged(), **alike}, 0.5) == []
    (said,) = guard.look({**logged(), **alike}, 0.5)
    assert "'clips'" in said and "photos" not in said
    worse = {**logged(loss=5.0, logit_scale=1.0), **alike}
    for _ in range(9):
        assert guard.look(worse, 0.6) == []
    assert sorted(text[:11] for text in guard.look(worse, 0.6)) == ["logit_scale", "the contras"]


def test_few_negatives_are_said_at_once_and_once() -> None:
    guard = guard_of(("photos", 64), ("clips", 8))
    (said,) = guard.look({**logged(), **logged("clips", loss=0.1)}, 0.0)
    assert "8 samples of 'clips'" in said and "only 7 others" in said
    assert_names_keys(said, ["data.blocks", "train.micro_batch"])
    for progress in (0.0, 0.5):
        assert guard.look({**logged(), **logged("clips", loss=0.1)}, progress) == []
    assert guard_of(("clips", 8), loss="sigmoid").look({}, 0.0) == []


# one batch ------------------------------------------------------------------------------------

ONE_BATCH = ("debug.overfit_batch=true", "data.flip=true", "model.keep_rate=1.0")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Tensor]]]:
    """What each step was made of."""
    found: list[list[dict[str, Tensor]]] = []
    honest = Accumulator.train

    def spy(self: Accumulator, step: int, progress: float, cut: Any, loaded: Any) -> Any:
        found.append([{k: v.clone() for k, v in item.batch.items()} for item in loaded])
        return honest(self, step, progress, cut, loaded)

    monkeypatch.setattr(Accumulator, "train", spy)
    return found


def same_batches(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_overfitting_sees_the_same_samples_plain(
    demo: Path, tmp_path: Path, batches: list[list[dict[str, Tensor]]]
) -> None:
    train("clip", demo, tmp_path / "one", *QUICK, *ONE_BATCH, "train.micro_batch=4")
    assert len(batches) == 4 and [len(b["pixels"]) for b in batches[0]] == [4, 4, 4]
    assert all(same_batches(batches[0], other) for other in batches[1:])
    train("clip", demo, tmp_path / "all", *QUICK, "train.micro_batch=4")
    assert not same_batches(batches[4], batches[5])
    assert not same_batches(batches[0], batches[4])  # the same samples, but cut at random
    source = open_source("photos", str(demo / "photos"), "image")
    stage = ClipStage(settings("clip", demo, tmp_path))
    stage.prepare({"photos": source}, Parents())
    every = [stage.transform(source.sample(*place, 32, 4), None) for place in source.places()]
    for row in torch.cat([b["pixels"] for b in batches[0][:2]]):
        assert sum(torch.equal(row, sample["pixels"]) for sample in every) == 1


def test_one_batch_is_learned_and_the_log_says_so(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = (PHOTOS, *ONE_BATCH, "train.samples=240", "train.save_every=0", "optim.base_lr=0.2")
    with caplog.at_level("INFO", "xray"):
        train("clip", demo, tmp_path, *asked)
    losses = [row["loss"] for row in rows_of(tmp_path)]
    assert losses[-1] < 0.5 * math.log(8) < 0.75 * losses[0]
    (said,) = [r.message for r in caplog.records if "overfit_batch" in r.message]
    assert "after 30 steps on the same 8 samples photos/loss is" in said
    assert said.endswith("guessing gives 2.079: learned") and "not learned" not in said
    assert "nothing is learned" not in caplog.text


def test_a_batch_that_is_not_learned_is_said_with_what_to_try(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = (PHOTOS, *ONE_BATCH, "train.samples=160", "train.save_every=0", "optim.base_lr=1e-7")
    with caplog.at_level("INFO", "xray"):
        train("clip", demo, tmp_path, *asked)
    told = [r.message for r in caplog.records if r.message.startswith("overfit_batch")]
    assert len(told) == 1 and "guessing gives 2.079: not learned" in told[0]
    assert_names_keys(told[0], ["optim.base_lr", "train.samples"])
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert sum("nothing is learned" in text for text in warned) == 1  # the guard, over the run
    assert sum("only 7 others" in text for text in warned) == 1


def test_the_samples_of_a_loss_that_is_not_finite_are_those_of_the_one_batch(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = ClipModule.loss_from_features, []

    def poisoned(self: ClipModule, features: State) -> StepOutput:
        calls.append(1)
        loss, metrics = honest(self, features)
        return StepOutput(loss * (float("nan") if len(calls) == 3 else 1), metrics)

    def positions(out: Path, *asked: str) -> Any:
        calls.clear()
        with pytest.raises(TrainingError, match="the loss of step 3 is nan"):
            train("clip", demo, out, *QUICK, PHOTOS, *asked)
        facts = json.loads((out / "bundles" / "step_00000002" / "bundle.json").read_text())
        return [sample["position"] for sample in facts["samples"]["photos"]]

    monkeypatch.setattr(ClipModule, "loss_from_features", poisoned)
    one = positions(tmp_path / "one", ONE_BATCH[0])
    every = positions(tmp_path / "every")
    assert len(one) == len(every) == 8
    assert 0 in one and not set(one) & set(every)


# what is refused ------------------------------------------------------------------------------

REFUSED = [
    ("clip.logit_scale=0.5", r"clip\.logit_scale=0\.5 .*clip\.logit_scale_max=100"),
    ("clip.logit_scale=200", r"clip\.logit_scale=200"),
    ("clip.loss=sigmoid clip.logit_scale_max=5", r"clip\.logit_scale=10.*clip\.logit_scale_max=5"),
    ("clip.loss=other", r"clip\.loss"),
    ("clip.captions=0", r"clip\.captions"),
    ("clip.embed_dim=0", r"clip\.embed_dim"),
    ("clip.adapter_blocks=17", r"clip\.adapter_blocks=17"),
    ("clip.adapter_blocks=-1", r"clip\.adapter_blocks=-1"),
    ("clip.matryoshka=[4,16]", r"clip\.matryoshka: 16 .*clip\.embed_dim=16"),
    ("clip.matryoshka=[0]", r"clip\.matryoshka: 0"),
    ("clip.mask_ratio=1", r"clip\.mask_ratio=1"),
    ("clip.mask_ratio=-0.1", r"clip\.mask_ratio=-0\.1"),
    ("clip.mask_ratio=nan", r"clip\.mask_ratio=nan"),
    ("clip.mask_span=[0.5]", r"clip\.mask_span=\[0\.5\]"),
    ("clip.mask_span=[0.6,0.5]", r"clip\.mask_span=\[0\.6, 0\.5\]"),
    ("clip.mask_span=[0.5,1.5]", r"clip\.mask_span=\[0\.5, 1\.5\]"),
    ("optim.betas=[0.9]", r"optim\.betas=\[0\.9\]"),
    ("optim.clip_grad=-1", r"optim\.clip_grad=-1"),
    ("optim.warmup=1", r"optim\.warmup=1"),
    ("optim.vision.freeze=1.5", r"optim\.vision\.freeze=1\.5"),
    ("optim.text.freeze=-0.1", r"optim\.text\.freeze=-0\.1"),
    ("optim.vision.lr=0", r"optim\.vision: lr=0"),
    ("optim.text.layer_decay=0", r"optim\.text: .*layer_decay=0"),
    ("optim.vision.layer_decay=1.1", r"optim\.vision: .*layer_decay=1\.1"),
    ("optim.text.lr=0.1", r"optim\.text .*text\.tune=none"),
    ("text.max_length=0", r"text\.max_length=0"),
    ("text.latents=0", r"text\.latents=0"),
    ("text.lora_rank=-1", r"text\.lora_rank=-1"),
    ("text.features=int8 text.tune=full", r"text\.features=int8 .*text\.tune=none"),
    ("text.tune=full text.dtype=bf16", r"text\.dtype=bf16 .*text\.tune=full"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_settings_that_cannot_be_are_refused_by_key(
    demo: Path, tmp_path: Path, asked: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings("clip", demo, tmp_path, *asked.split())


def test_settings_at_their_limits_are_taken(demo: Path, tmp_path: Path) -> None:
    asked = (
        "clip.logit_scale=100", "clip.adapter_blocks=0", "clip.matryoshka=[15,1]",
        "clip.mask_ratio=0.99", "clip.mask_span=[0.5,0.5]", "optim.warmup=0",
        "optim.vision.freeze=1", "optim.text.layer_decay=1", "optim.clip_grad=0",
    )  # fmt: skip
    assert settings("clip", demo, tmp_path, *asked).clip.matryoshka == [15, 1]


def test_a_block_larger_than_its_source_is_told(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for samples, told in ((96, False), (97, True)):
        blocks = f"data.blocks=[{{source: photos, samples: {samples}}}]"
        train("clip", demo, tmp_path / str(samples), blocks, f"train.samples={samples}")
        assert ("source photos has 96 samples, and a block 97" in caplog.text) == told
