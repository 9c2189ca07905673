"""Token reduction: plain implementations, published counts, and what it must work with."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from plain_vit import plain_evit, plain_tome
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xray.config import ModelConfig
from xray.errors import ConfigError
from xray.models import VisionBackbone
from xray.models.flops import decoder_macs, vision_macs
from xray.models.mae_decoder import MaeDecoder
from xray.models.token_reduction import cls_attention

SMALL = {"embed_dim": 64, "depth": 8, "num_heads": 4}
REDUCTIONS = ["evit", "tome", "random"]


def backbone(reduce: str, **more: object) -> VisionBackbone:
    torch.manual_seed(0)
    kwargs = {**SMALL, **more.pop("kwargs", {})}  # type: ignore[dict-item]
    ours = VisionBackbone(ModelConfig(kwargs=kwargs, reduce=reduce, **more), 64, 4)  # type: ignore[arg-type]
    for parameter in ours.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return ours.eval()


def assert_same(ours: VisionBackbone, a: Callable[[], Tensor], b: Callable[[], Tensor]) -> None:
    """Values to 1e-10 and gradients to 1e-8, in float64."""
    found = []
    for run in (a, b):
        ours.zero_grad()
        out = run()
        out.square().sum().backward()
        grads = {k: p.grad.clone() for k, p in ours.named_parameters() if p.grad is not None}
        found.append((out.detach(), grads))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-10)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        assert torch.allclose(grad, found[1][1][name], atol=1e-8), name


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rates", [[0.7, 0.7, 0.7], [0.9, 0.5, 0.3]])
def test_evit_equals_a_plain_implementation(frames: int, fuse: bool, rates: list[float]) -> None:
    ours = backbone("evit", fuse=fuse).double()
    pixels = torch.randn(3, frames, 3, 64, 64, dtype=torch.float64)
    assert_same(
        ours, lambda: ours(pixels, rates).cls, lambda: plain_evit(ours, pixels, rates, fuse)
    )


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("registers", [0, 3, 4])
@pytest.mark.parametrize("rate", [0.75, 0.5])
def test_tome_equals_a_plain_implementation(frames: int, registers: int, rate: float) -> None:
    ours = backbone("tome", kwargs={"reg_tokens": registers}).double()
    pixels = torch.randn(3, frames, 3, 64, 64, dtype=torch.float64)
    assert_same(ours, lambda: ours(pixels, rate).cls, lambda: plain_tome(ours, pixels, rate))


@torch.no_grad()
def test_cls_attention_equals_explicit_attention() -> None:
    q, k = torch.randn(2, 2, 3, 17, 8, dtype=torch.float64)
    full = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)[:, :, 0, 1:].mean(1)
    assert (cls_attention(q, k, 1) - full).abs().max() < 1e-12


@torch.no_grad()
def test_random_is_fresh_in_training_and_fixed_in_evaluation() -> None:
    ours = backbone("random")
    pixels = torch.randn(1, 1, 3, 64, 64).expand(2, -1, -1, -1, -1)
    fixed = ours(pixels, 0.5, track=True)
    assert torch.equal(fixed.cls, ours(pixels, 0.5).cls)
    assert torch.equal(fixed.assign[0][0], fixed.assign[0][1])
    kept = (fixed.assign[0][0] < 8).nonzero()[:, 0]
    assert len(kept) == 8 and not torch.equal(kept, torch.arange(8))
    ours.train()
    fresh = ours(pixels, 0.5, track=True).assign[0]
    assert not torch.equal(fresh[0], fresh[1])


# counts -----------------------------------------------------------------------------------------

TABLE = {  # methods.md 2.2: tokens after blocks 3, 6, 9 and GMACs of DeiT-S, fused and not
    (0.9, True): ([178, 162, 147], 4.02),
    (0.8, True): ([158, 128, 104], 3.48),
    (0.7, True): ([139, 99, 71], 3.03),
    (0.6, True): ([119, 73, 45], 2.64),
    (0.5, True): ([99, 51, 27], 2.31),
    (0.9, False): ([177, 160, 144], 3.99),
    (0.8, False): ([157, 126, 101], 3.44),
    (0.7, False): ([138, 97, 68], 3.00),
    (0.6, False): ([118, 71, 43], 2.61),
    (0.5, False): ([98, 49, 25], 2.28),
}


def on_meta(name: str, resolution: int = 224, frames: int = 16, **more: object) -> VisionBackbone:
    with torch.device("meta"):
        return VisionBackbone(ModelConfig(name=name, **more), resolution, frames)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate", "fuse"), TABLE)
def test_counts_and_macs_of_the_published_table(rate: float, fuse: bool) -> None:
    counts, gmacs = TABLE[rate, fuse]
    model = on_meta("vit_small_patch16_224", fuse=fuse)
    assert [model.token_counts(196, rate)[i] for i in (3, 6, 9)] == counts
    assert round(vision_macs(model, 1, 224, rate) / 1e9, 2) == gmacs
    assert round(vision_macs(model) / 1e9, 2) == 4.60


@pytest.mark.parametrize(
    ("at", "rate", "image", "video"),
    [
        ([3, 6, 9], 0.7, 0.661, 0.627),
        ([3, 7, 10], 0.7, 0.690, 0.657),
        ([4, 8, 11], 0.7, 0.743, 0.716),
        ([3, 6, 9], 0.5, 0.502, 0.479),
        ([3, 7, 10], 0.5, 0.532, 0.507),
        ([4, 8, 11], 0.5, 0.603, 0.582),
    ],
)
def test_shares_of_macs_at_other_layers(
    at: list[int], rate: float, image: float, video: float
) -> None:
    model = on_meta("vit_base_patch16_224", reduce_at=at)
    for frames, share in ((1, image), (16, video)):
        ratio = vision_macs(model, frames, 224, rate) / vision_macs(model, frames)
        assert ratio == pytest.approx(share, abs=6e-4)
    assert model.token_counts(1568, 0.7)[-1] == 541 and model.token_counts(1568, 0.5)[-1] == 198


@pytest.mark.parametrize("reduce", [*REDUCTIONS, "none"])
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 4, "qk_norm": True}])
@torch.no_grad()
def test_macs_are_what_torch_counts(reduce: str, frames: int, kwargs: dict) -> None:
    ours, rate = backbone(reduce, kwargs=kwargs), 1.0 if reduce == "none" else 0.6
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        ours(torch.randn(1, frames, 3, 64, 64), rate)
    assert counter.get_total_flops() == 2 * vision_macs(ours, frames, 64, rate)


@torch.no_grad()
def test_macs_of_frames_and_masked_encoders_are_what_torch_counts() -> None:
    frames = backbone("evit", video="frames", frame_pool="attention")
    visible = torch.arange(5)[None]
    decoder = MaeDecoder(64, 24, 32, 2, 2)
    restore = torch.arange(16)[None]
    cases = [
        (lambda: frames(torch.randn(1, 3, 3, 64, 64), 0.6), vision_macs(frames, 3, 64, 0.6)),
        (
            lambda: frames(torch.randn(1, 1, 3, 64, 64), visible=visible),
            vision_macs(frames, 1, 64, visible=5),
        ),
        (
            lambda: decoder(torch.randn(1, 64), torch.randn(1, 5, 64), restore, (1, 4, 4)),
            decoder_macs(decoder, 16, 5),
        ),
    ]
    for run, macs in cases:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            run()
        assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_tome_and_random_leave_as_many_tokens_as_evit(fuse: bool) -> None:
    pixels = torch.randn(1, 4, 3, 64, 64)
    for rate in (0.9, 0.7, 0.5):
        left = {
            reduce: [
                int(a.max()) + 1 for a in backbone(reduce, fuse=fuse)(pixels, rate, None, True)[2]
            ]
            for reduce in REDUCTIONS
        }
        kept = [backbone("evit", fuse=fuse).token_counts(32, rate)[i] for i in (2, 4, 6)]
        assert left["tome"] == kept
        if fuse:
            assert left["evit"] == left["random"] == kept


# bookkeeping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
@torch.no_grad()
def test_assign_says_where_each_token_went_at_each_depth(reduce: str) -> None:
    ours = backbone(reduce)
    tokens = ours(torch.randn(2, 1, 3, 64, 64), 0.7, track=True)
    assert len(tokens.assign) == 3 and all(a.shape == (2, 16) for a in tokens.assign)
    for depth, left in enumerate(ours.token_counts(16, 0.7)[2:7:2]):
        for row in tokens.assign[depth]:  # every token has inputs, and every input a token
            assert torch.equal(torch.bincount(row, minlength=left) > 0, torch.ones(left).bool())
    for early, late in zip(tokens.assign, tokens.assign[1:], strict=False):
        for a, b in zip(early, late, strict=True):  # what was joined stays together
            for token in a.unique():
                assert len(b[a == token].unique()) == 1
    dense = tokens.dense()
    assert torch.equal(dense[1, 5], tokens.patches[1, tokens.assign[-1][1, 5]])
    assert ours(torch.randn(1, 1, 3, 64, 64), track=True).dense().shape == (1, 16, 64)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("video", ["joint", "frames"])
@torch.no_grad()
def test_a_rate_that_changes_nothing_is_tracked_too(reduce: str, video: str) -> None:
    """.95 of 20 tokens is 19, and one fused; .99 of 20 is 20."""
    ours = backbone(reduce, video=video)
    clip = torch.randn(1, 2 if video == "frames" else 1, 3, 64, 80)
    for rate in (0.95, 0.99):
        tokens = ours(clip, rate, track=True)
        assert len(tokens.assign) == 3
        assert tokens.patches.shape[1] == len(clip[0]) * 20
        assert torch.equal(tokens.assign[0].sort(1).values[0], torch.arange(len(clip[0]) * 20))


def test_tome_keeps_to_fused_attention_in_training() -> None:
    """A mask with a gradient would take SDPA from its fused kernels."""
    ours, seen = backbone("tome"), []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Tensor, attn_mask: Tensor | None = None, **more: float) -> Tensor:
        seen.append(attn_mask)
        return fused(*args, attn_mask=attn_mask, **more)

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", watched):
        ours(torch.randn(1, 1, 3, 64, 64), 0.7).cls.sum().backward()
    masks = [mask for mask in seen if mask is not None]
    assert len(masks) == 5 and not any(mask.requires_grad for mask in masks)


@torch.no_grad()
def test_dropped_tokens_are_nowhere() -> None:
    tokens = backbone("evit", fuse=False)(torch.randn(1, 1, 3, 64, 64), 0.5, track=True)
    assert [(a >= 0).sum().item() for a in tokens.assign] == [8, 4, 2]
    gone = tokens.assign[-1][0] < 0
    assert tokens.dense()[0, gone].abs().max() == 0 and tokens.dense()[0, ~gone].abs().min() > 0


# what it must work with -------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_checkpointing_and_drop_path_do_not_change_gradients(reduce: str) -> None:
    ours = backbone(reduce, drop_path=0.3).train()
    pixels, grads = torch.randn(3, 4, 3, 64, 64), []
    for checkpointing in (False, True):
        ours.set_grad_checkpointing(checkpointing)
        ours.zero_grad()
        torch.manual_seed(1)
        ours(pixels, 0.7).cls.square().sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_bf16_autocast(reduce: str) -> None:
    ours = backbone(reduce)
    pixels = torch.randn(2, 4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = ours(pixels, 0.7)
    tokens.cls.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)
    exact = ours(pixels, 0.7).cls
    assert torch.nn.functional.cosine_similarity(tokens.cls.float(), exact).min() > 0.98


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_it_compiles_whole(reduce: str) -> None:
    """No graph break; aot_eager traces forward and backward without a C++ compiler."""
    torch._dynamo.reset()
    ours = backbone(reduce, kwargs={"depth": 4})
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=False)
    pixels = torch.randn(2, 1, 3, 64, 64)
    for rate in (0.85, 0.7):  # a schedule steps through rates: a graph for each
        expected, found = ours(pixels, rate).cls, compiled(pixels, rate).cls
        assert torch.allclose(expected, found, atol=1e-5)
        found.sum().backward()


def test_rates_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"keep_rate=0.4 must be at least 0.5 .*tome"):
        backbone("tome", keep_rate=0.4)
    with pytest.raises(ConfigError, match="2 keep rates for 3 reducing blocks"):
        backbone("evit", keep_rates=[0.7, 0.5])
    with pytest.raises(ConfigError, match="must be blocks 0 to 7"):
        backbone("evit", reduce_at=[3, 8])
    with pytest.raises(ConfigError, match="must rise"):
        backbone("evit", reduce_at=[5, 3])
    pixels = torch.randn(1, 1, 3, 64, 64)
    with pytest.raises(ConfigError, match=r"must be numbers in \(0, 1\]"):
        backbone("evit")(pixels, 0.0)
    with pytest.raises(ConfigError, match="reduce=none keeps every token"):
        backbone("none")(pixels, 0.7)
    with pytest.raises(ValueError, match="track=True"):
        backbone("evit")(pixels, 0.7).dense()
    with pytest.raises(ConfigError, match="cannot merge"):
        backbone("tome")(torch.randn(1, 1, 3, 64, 64), 0.3)
