"""Tests of token reduction against simple implementations and published counts."""

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
    model = VisionBackbone(ModelConfig(kwargs=kwargs, reduce=reduce, **more), 64, 4)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def assert_same(model: VisionBackbone, a: Callable[[], Tensor], b: Callable[[], Tensor]) -> None:
    """Compare outputs to 1e-10 and gradients to 1e-8, in float64."""
    results = []
    for run in (a, b):
        model.zero_grad()
        out = run()
        out.square().sum().backward()
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), grads))
    (output, gradients), (expected_output, expected_gradients) = results
    assert torch.allclose(output, expected_output, atol=1e-10)
    assert gradients.keys() == expected_gradients.keys()
    for name, grad in gradients.items():
        assert torch.allclose(grad, expected_gradients[name], atol=1e-8), name


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rates", [[0.7, 0.7, 0.7], [0.9, 0.5, 0.3]])
def test_evit_equals_a_simple_implementation(frames: int, fuse: bool, rates: list[float]) -> None:
    model = backbone("evit", fuse=fuse).double()
    pixels = torch.randn(3, frames, 3, 64, 64, dtype=torch.float64)
    assert_same(
        model, lambda: model(pixels, rates).cls, lambda: plain_evit(model, pixels, rates, fuse)
    )


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("registers", [0, 3, 4])
@pytest.mark.parametrize("rate", [0.75, 0.5])
def test_tome_equals_a_simple_implementation(frames: int, registers: int, rate: float) -> None:
    model = backbone("tome", kwargs={"reg_tokens": registers}).double()
    pixels = torch.randn(3, frames, 3, 64, 64, dtype=torch.float64)
    assert_same(model, lambda: model(pixels, rate).cls, lambda: plain_tome(model, pixels, rate))


def test_tome_without_proportional_attention_equals_a_simple_implementation() -> None:
    model = backbone("tome", proportional_attention=False).double()
    pixels = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64)
    assert_same(
        model, lambda: model(pixels, 0.5).cls, lambda: plain_tome(model, pixels, 0.5, False)
    )
    other = backbone("tome").double()
    assert (model(pixels, 0.5).cls - other(pixels, 0.5).cls).abs().max() > 1e-4


@torch.no_grad()
def test_cls_attention_equals_explicit_attention() -> None:
    q, k = torch.randn(2, 2, 3, 17, 8, dtype=torch.float64)
    full = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)[:, :, 0, 1:].mean(1)
    assert (cls_attention(q, k, 1) - full).abs().max() < 1e-12


@torch.no_grad()
def test_random_varies_in_training_and_is_fixed_in_evaluation() -> None:
    model = backbone("random")
    pixels = torch.randn(1, 1, 3, 64, 64).expand(2, -1, -1, -1, -1)
    fixed = model(pixels, 0.5, track=True)
    assert torch.equal(fixed.cls, model(pixels, 0.5).cls)
    assert torch.equal(fixed.assign[0][0], fixed.assign[0][1])
    kept = (fixed.assign[0][0] < 8).nonzero()[:, 0]
    assert len(kept) == 8 and not torch.equal(kept, torch.arange(8))
    model.train()
    varied = model(pixels, 0.5, track=True).assign[0]
    assert not torch.equal(varied[0], varied[1])


# token and MAC counts ----------------------------------------------------------------------------

# (keep rate, fuse) -> tokens after blocks 3, 6, 9 and GMACs of DeiT-S, as EViT's paper has them
TABLE = {
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


def meta_backbone(
    name: str, resolution: int = 224, frames: int = 16, **more: object
) -> VisionBackbone:
    with torch.device("meta"):
        return VisionBackbone(ModelConfig(name=name, **more), resolution, frames)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate", "fuse"), TABLE)
def test_counts_and_macs_equal_the_published_table(rate: float, fuse: bool) -> None:
    counts, gmacs = TABLE[rate, fuse]
    model = meta_backbone("vit_small_patch16_224", fuse=fuse)
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
def test_relative_macs_with_other_reducing_blocks(
    at: list[int], rate: float, image: float, video: float
) -> None:
    model = meta_backbone("vit_base_patch16_224", reduce_at=at)
    for frames, share in ((1, image), (16, video)):
        ratio = vision_macs(model, frames, 224, rate) / vision_macs(model, frames)
        assert ratio == pytest.approx(share, abs=6e-4)
    assert model.token_counts(1568, 0.7)[-1] == 541 and model.token_counts(1568, 0.5)[-1] == 198


@pytest.mark.parametrize("reduce", [*REDUCTIONS, "none"])
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 4, "qk_norm": True}])
@torch.no_grad()
def test_macs_equal_torchs_flop_counter(reduce: str, frames: int, kwargs: dict) -> None:
    model, rate = backbone(reduce, kwargs=kwargs), 1.0 if reduce == "none" else 0.6
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, frames, 3, 64, 64), rate)
    assert counter.get_total_flops() == 2 * vision_macs(model, frames, 64, rate)


@torch.no_grad()
def test_macs_of_frames_and_masked_encoders_equal_torchs_flop_counter() -> None:
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
            lambda: decoder(
                torch.randn(1, 64), torch.randn(1, 5, 64), restore, (1, 4, 4), restore[:, 5:]
            ),
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
def test_tome_and_random_keep_as_many_tokens_as_evit(fuse: bool) -> None:
    pixels = torch.randn(1, 4, 3, 64, 64)
    for rate in (0.9, 0.7, 0.5):
        counts = {
            reduce: [
                int(a.max()) + 1 for a in backbone(reduce, fuse=fuse)(pixels, rate, None, True)[2]
            ]
            for reduce in REDUCTIONS
        }
        kept = [backbone("evit", fuse=fuse).token_counts(32, rate)[i] for i in (2, 4, 6)]
        assert counts["tome"] == kept
        if fuse:
            assert counts["evit"] == counts["random"] == kept


# assignment of input tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
@torch.no_grad()
def test_assign_maps_each_input_token_at_each_depth(reduce: str) -> None:
    model = backbone(reduce)
    tokens = model(torch.randn(2, 1, 3, 64, 64), 0.7, track=True)
    assert len(tokens.assign) == 3 and all(a.shape == (2, 16) for a in tokens.assign)
    for depth, count in enumerate(model.token_counts(16, 0.7)[2:7:2]):
        for row in tokens.assign[depth]:  # every remaining token holds at least one input token
            assert torch.equal(torch.bincount(row, minlength=count) > 0, torch.ones(count).bool())
    for early, late in zip(tokens.assign, tokens.assign[1:], strict=False):
        for a, b in zip(early, late, strict=True):  # merged tokens stay merged
            for token in a.unique():
                assert len(b[a == token].unique()) == 1
    dense = tokens.dense()
    assert torch.equal(dense[1, 5], tokens.patches[1, tokens.assign[-1][1, 5]])
    assert model(torch.randn(1, 1, 3, 64, 64), track=True).dense().shape == (1, 16, 64)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("video", ["joint", "frames"])
@torch.no_grad()
def test_rates_that_remove_no_token_are_tracked(reduce: str, video: str) -> None:
    """A rate of .95 keeps 19 of 20 tokens plus the fused one; a rate of .99 keeps 20."""
    model = backbone(reduce, video=video)
    clip = torch.randn(1, 2 if video == "frames" else 1, 3, 64, 80)
    for rate in (0.95, 0.99):
        tokens = model(clip, rate, track=True)
        assert len(tokens.assign) == 3
        assert tokens.patches.shape[1] == len(clip[0]) * 20
        assert torch.equal(tokens.assign[0].sort(1).values[0], torch.arange(len(clip[0]) * 20))


def test_tome_allows_fused_attention_in_training() -> None:
    """SDPA does not use its fused kernels if the mask needs a gradient."""
    model, all_masks = backbone("tome"), []
    fused = torch.nn.functional.scaled_dot_product_attention

    def recording(*args: Tensor, attn_mask: Tensor | None = None, **more: float) -> Tensor:
        all_masks.append(attn_mask)
        return fused(*args, attn_mask=attn_mask, **more)

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", recording):
        model(torch.randn(1, 1, 3, 64, 64), 0.7).cls.sum().backward()
    masks = [mask for mask in all_masks if mask is not None]
    assert len(masks) == 5 and not any(mask.requires_grad for mask in masks)


@torch.no_grad()
def test_dropped_tokens_have_no_assignment_and_zero_features() -> None:
    tokens = backbone("evit", fuse=False)(torch.randn(1, 1, 3, 64, 64), 0.5, track=True)
    assert [(a >= 0).sum().item() for a in tokens.assign] == [8, 4, 2]
    dropped = tokens.assign[-1][0] < 0
    dense = tokens.dense()[0]
    assert dense[dropped].abs().max() == 0 and dense[~dropped].abs().min() > 0


# together with checkpointing, autocast and compilation -------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_checkpointing_and_drop_path_do_not_change_gradients(reduce: str) -> None:
    model = backbone(reduce, drop_path=0.3, kwargs={"proj_drop_rate": 0.1}).train()
    pixels, grads = torch.randn(3, 4, 3, 64, 64), []
    for checkpointing in (False, True, "mlp"):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(1)
        model(pixels, 0.7).cls.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b, c in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a, c, atol=1e-5)


def kept_values(model: VisionBackbone, width: int) -> int:
    """Count the values of this last dimension that are kept for the backward pass."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(2, 1, 3, 64, 64), 0.7)
    return sum(t.numel() for t in kept if t.shape[-1] == width and t.data_ptr() not in weights)


def test_hidden_activations_of_mlps_are_not_kept() -> None:
    model = backbone("evit").train()
    tokens = 2 * (17 + 14 + 12 + 10)  # of the blocks, two by two
    # before and after the activation, for two images
    assert kept_values(model, 4 * 64) == 2 * 2 * tokens * 4 * 64
    model.set_grad_checkpointing("mlp")
    assert kept_values(model, 4 * 64) == 0


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_bf16_autocast(reduce: str) -> None:
    model = backbone(reduce)
    pixels = torch.randn(2, 4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model(pixels, 0.7)
    tokens.cls.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    exact = model(pixels, 0.7).cls
    assert torch.nn.functional.cosine_similarity(tokens.cls.float(), exact).min() > 0.98


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_compiles_without_graph_breaks(reduce: str) -> None:
    """aot_eager traces forward and backward and needs no C++ compiler."""
    torch._dynamo.reset()
    model = backbone(reduce, kwargs={"depth": 4})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    pixels = torch.randn(2, 1, 3, 64, 64)
    for rate in (0.85, 0.7):  # the schedule's steps: each rate has its graph
        expected, actual = model(pixels, rate).cls, compiled(pixels, rate).cls
        assert torch.allclose(expected, actual, atol=1e-5)
        actual.sum().backward()


def test_invalid_rates_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"keep_rate=0.4 must be at least 0.5 .*tome"):
        backbone("tome", keep_rate=0.4)
    with pytest.raises(ConfigError, match="2 keep rates for 3 reducing blocks"):
        backbone("evit", keep_rates=[0.7, 0.5])
    with pytest.raises(ConfigError, match="must be numbers from 0 to 7"):
        backbone("evit", reduce_at=[3, 8])
    with pytest.raises(ConfigError, match="must be in increasing order"):
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
