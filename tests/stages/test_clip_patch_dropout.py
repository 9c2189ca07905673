"""Patch dropout in the clip stage: schedule, random masks, and the gradient cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_runs import LORA, assert_same_training, module_of
from tiny import QUICK, train
from torch import Tensor

from stages.clip import ClipModule
from stages.clip_config import ClipOptions
from xray.models.patch_dropout import draw_visible
from xray.training.engine import Engine


def test_mask_ratio_rises_in_steps_and_returns_to_0() -> None:
    at = ClipOptions(mask_ratio=0.5, mask_span=[0.2, 0.6], mask_until=0.9).masked
    assert at(0.0) == at(0.19) == at(0.2) == 0
    for step in range(8):
        assert at(0.2 + 0.4 * (step + 0.5) / 8) == pytest.approx(0.5 * step / 8)
    assert at(0.6) == at(0.899) == 0.5  # exactly
    assert at(0.9) == at(1.0) == 0
    assert {at(i / 1000) for i in range(1000)} == {0.5 * step / 8 for step in range(9)}
    assert ClipOptions(mask_ratio=0.5).masked(0.0) == 0.5


@pytest.mark.parametrize("start", [0.3, 1.0])
def test_mask_ratio_without_a_ramp_changes_at_once(start: float) -> None:
    options = ClipOptions(mask_ratio=0.5, mask_span=[start, start], mask_until=1.1)
    assert (options.masked(start - 0.01), options.masked(start)) == (0, 0.5)


@pytest.mark.parametrize(("grid", "ratio", "kept"), [((2, 3, 4), 0.5, 6), ((3, 2, 6), 0.3, 8)])
def test_visible_patches_are_distinct_and_uniform(
    grid: tuple[int, int, int], ratio: float, kept: int
) -> None:
    torch.manual_seed(0)
    (t, h, w), times = grid, 4000
    for per_slot in (True, False):
        places = draw_visible(grid, times, ratio, per_slot, torch.device("cpu"))
        number = t * kept if per_slot else round(t * h * w * (1 - ratio))
        assert places.shape == (times, number)
        assert all(len(set(row)) == number for row in places[:200].tolist())
        # Masks differ between samples.
        assert len({tuple(sorted(row)) for row in places[:50].tolist()}) > 40
        counts = torch.bincount(places.flatten(), minlength=t * h * w)
        share = number / (t * h * w)
        assert len(counts) == t * h * w
        deviation = (counts - times * share) / math.sqrt(times * share * (1 - share))
        assert deviation.abs().max() < 4.5
        if per_slot:  # the same number in each time slot, in order
            assert torch.equal(places // (h * w), torch.arange(t).repeat_interleave(kept).expand(
                times, -1))  # fmt: skip
    few = draw_visible(grid, 3, 0.999, True, torch.device("cpu"))
    assert few.shape == (3, t)  # at least one per slot


@pytest.mark.parametrize(("video", "tokens"), [("joint", (16, 32)), ("frames", (16, 16))])
def test_the_backbone_sees_fewer_tokens_only_in_training(
    demo: Path, tmp_path: Path, video: str, tokens: tuple[int, int]
) -> None:
    overrides = ("clip.mask_ratio=0.5", "clip.mask_until=0.9", f"model.video={video}")
    module = module_of(demo, tmp_path, *overrides)
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
    visible = module._visible(pixels, 0.5)  # of the clips
    assert visible is not None
    if video == "frames":  # the same number in each frame, in order
        assert torch.equal(visible // 16, torch.arange(4).repeat_interleave(8).expand(2, -1))


def test_both_passes_of_a_split_block_use_the_same_masks(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The split block also trains as the whole block does with the same masks."""
    overrides = (
        *QUICK,
        *LORA,
        "text.lora_dropout=0.0",
        "clip.mask_ratio=0.5",
        "clip.mask_until=0.8",
    )
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
    train("clip", demo, tmp_path / "split", *overrides, "train.micro_batch=2")
    assert len(drawn) == len(features) == 4 * 2 * 6  # steps, passes, micro-batches
    masks: list[Tensor | None] = []
    for step in range(4):
        first, second = (range(12 * step + 6 * p, 12 * step + 6 * p + 6) for p in (0, 1))
        for a, b in zip(first, second, strict=True):
            for name in ("image", "text"):
                assert torch.allclose(features[a][name], features[b][name], atol=1e-6)
                assert features[b][name].requires_grad and not features[a][name].requires_grad
        step_masks = [drawn[a] for a in first]
        if step == 3:  # progress 0.875
            assert step_masks == [None] * 6
            masks += [None, None]
            continue
        own = [mask for mask in step_masks if mask is not None]
        assert [mask.shape for mask in own] == [(2, 8)] * 4 + [(2, 16)] * 2
        assert not torch.equal(own[0], own[1])
        masks += [torch.cat(own[:4]), torch.cat(own[4:])]

    monkeypatch.setattr(Engine, "__call__", call)
    monkeypatch.setattr(ClipModule, "_visible", lambda *_: masks.pop(0))
    train("clip", demo, tmp_path / "whole", *overrides)
    assert_same_training(tmp_path / "split", tmp_path / "whole", 4)
