"""The backbone against timm and against an independent, plain EViT."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from xray.config import ModelConfig
from xray.errors import ArtifactError, ConfigError
from xray.models import VisionBackbone
from xray.models.backbone import inflate, load_adapted
from xray.models.reduce import cls_attention, kept_tokens, rate_at


def pair(name: str, size: int, **kwargs: object) -> tuple[torch.nn.Module, VisionBackbone]:
    """timm's model and ours with its weights, through timm's own state dict."""
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, img_size=size, **kwargs).eval()
    for parameter in vit.parameters():  # zero-initialised tables would hide mistakes
        parameter.data += 0.02 * torch.randn_like(parameter)
    ours = VisionBackbone(ModelConfig(name=name, kwargs=dict(kwargs)), size, 4).eval()
    state = dict(vit.state_dict())
    state["patch_embed.proj.weight"] = inflate(state["patch_embed.proj.weight"], 2)
    state["pos_temporal"] = torch.randn_like(ours.pos_temporal)
    load_adapted(ours, state, "timm")
    return vit, ours


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("vit_tiny_patch16_224", 64, {}),
        ("vit_tiny_patch16_224", 64, {"qk_norm": True, "init_values": 0.1}),
        ("vit_small_patch14_reg4_dinov2", 56, {}),
        ("vit_base_patch32_clip_224", 64, {"depth": 3}),
        ("deit3_small_patch16_224", 48, {"depth": 3}),
    ],
)
@torch.no_grad()
def test_keep_rate_1_is_timm_bit_for_bit(name: str, size: int, kwargs: dict) -> None:
    vit, ours = pair(name, size, **kwargs)
    image = torch.randn(2, 3, size, size)
    tokens = ours(image[:, None])
    theirs = vit.forward_features(image)
    assert torch.equal(tokens.cls, theirs[:, 0])
    assert torch.equal(tokens.patches, theirs[:, ours.num_prefix_tokens :])


@torch.no_grad()
def test_still_clip_of_one_tubelet_agrees_with_the_image() -> None:
    _, ours = pair("vit_tiny_patch16_224", 64)
    image = torch.randn(2, 1, 3, 64, 64)
    difference = ours(image).cls - ours(image.expand(-1, 2, -1, -1, -1)).cls
    assert difference.abs().max() < 1e-5


@torch.no_grad()
def test_longer_clips_use_their_frames_and_their_order() -> None:
    _, ours = pair("vit_tiny_patch16_224", 64)
    clip = torch.randn(1, 4, 3, 64, 64)
    assert ours(clip).patches.shape[1] == 2 * 16
    assert (ours(clip).cls - ours(clip.flip(1)).cls).abs().max() > 1e-3


@torch.no_grad()
def test_other_sizes_interpolate_positions() -> None:
    vit, ours = pair("vit_tiny_patch16_224", 64)
    dynamic = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=64, dynamic_img_size=True
    ).eval()
    dynamic.load_state_dict(vit.state_dict())
    image = torch.randn(1, 3, 96, 48)
    assert torch.allclose(
        ours.forward_features(image[:, None]), dynamic.forward_features(image), atol=1e-5
    )
    assert ours(torch.randn(1, 8, 3, 64, 64)).patches.shape[1] == 4 * 16


def plain_evit(ours: VisionBackbone, pixels: Tensor, rate: float) -> Tensor:
    """EViT written out: explicit attention everywhere, boolean masks, one sample at a time."""
    rows = []
    P = ours.num_prefix_tokens
    for x in ours.embed(pixels):
        for number, block in enumerate(ours.blocks):
            attn, y = block.attn, block.norm1(x)
            N, D = y.shape
            q, k, v = attn.qkv(y).reshape(N, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + attn.proj((weights @ v).transpose(0, 1).reshape(N, D))
            if number in ours.reduce_at:
                score = weights[:, 0, P:].mean(0)
                keep = torch.zeros(N - P, dtype=torch.bool)
                keep[score.argsort(descending=True)[: math.ceil(rate * (N - P) - 1e-6)]] = True
                fused = (score[~keep, None] * x[P:][~keep]).sum(0, keepdim=True)
                x = torch.cat([x[:P], x[P:][keep], fused])
            x = x + block.mlp(block.norm2(x))
        rows.append(ours.norm(x)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("rate", [0.7, 0.5])
def test_evit_equals_a_plain_implementation(frames: int, rate: float) -> None:
    _, ours = pair("vit_tiny_patch16_224", 64, depth=8)
    ours = ours.double()
    pixels = torch.randn(3, frames, 3, 64, 64, dtype=torch.float64)
    grads = []
    for run in (lambda: ours(pixels, rate).cls, lambda: plain_evit(ours, pixels, rate)):
        ours.zero_grad()
        out = run()
        out.square().sum().backward()
        grads.append(
            (out.detach(), [p.grad.clone() for p in ours.parameters() if p.grad is not None])
        )
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-10)
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-8)


@torch.no_grad()
def test_cls_attention_equals_explicit_attention() -> None:
    q, k = torch.randn(2, 2, 3, 17, 8, dtype=torch.float64)
    full = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)[:, :, 0, 1:].mean(1)
    assert (cls_attention(q, k, 1) - full).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("tokens", "rate", "expected"),
    [
        (196, 0.9, [178, 162, 147]),
        (196, 0.8, [158, 128, 104]),
        (196, 0.7, [139, 99, 71]),
        (196, 0.6, [119, 73, 45]),
        (196, 0.5, [99, 51, 27]),
        (1568, 0.7, [1099, 771, 541]),
        (1568, 0.5, [785, 394, 198]),
    ],
)
def test_token_counts_of_the_published_table(tokens: int, rate: float, expected: list[int]) -> None:
    counts, n = [], tokens
    for _ in range(3):
        n = kept_tokens(n, rate) + 1
        counts.append(n)
    assert counts == expected


def test_kept_tokens_is_safe_against_rounding() -> None:
    assert math.ceil(0.55 * 100) == 56 and kept_tokens(100, 0.55) == 55


@torch.no_grad()
def test_assign_says_where_each_token_went() -> None:
    _, ours = pair("vit_tiny_patch16_224", 64, depth=8)
    tokens = ours(torch.randn(2, 1, 3, 64, 64), 0.7, track=True)
    assert tokens.assign is not None and tokens.assign.shape == (2, 16)
    for row in tokens.assign:  # every token at the end has inputs, and every input a token
        counts = torch.bincount(row, minlength=tokens.patches.shape[1])
        assert len(counts) == tokens.patches.shape[1] and (counts >= 1).all()
        fused = sum(counts > 1)
        assert 1 <= fused <= len(ours.reduce_at)  # a fused token may be kept by a later block


def test_keep_rate_steps_to_its_target() -> None:
    rates = [rate_at(p / 100, 0.7, 8, [0.2, 0.6]) for p in range(101)]
    assert rates[0] == rates[20] == 1 and rates[60] == rates[100] == 0.7
    assert sorted(rates, reverse=True) == rates and len(set(rates)) == 9


def test_checkpointing_and_drop_path_do_not_change_gradients() -> None:
    config = ModelConfig(kwargs={"embed_dim": 32, "depth": 4, "num_heads": 2}, drop_path=0.3)
    torch.manual_seed(0)
    ours = VisionBackbone(config, 32, 4).train()
    pixels, grads = torch.randn(3, 4, 3, 32, 32), []
    for checkpointing in (False, True):
        ours.set_grad_checkpointing(checkpointing)
        ours.zero_grad()
        torch.manual_seed(1)
        ours(pixels, 0.7).cls.square().sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch61", "cannot build"),
        ("resnet18", "cannot build|no plain ViT"),
        ("vit_base_patch16_siglip_224", "no CLS token"),
    ],
)
def test_models_that_cannot_be_used(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionBackbone(ModelConfig(name=name), 32, 4)


def test_pretrained_file(tmp_path: object) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    path = f"{tmp_path}/vit.safetensors"
    save_file(vit.state_dict(), path)
    config = ModelConfig(kwargs={"depth": 2}, pretrained=path)
    ours = VisionBackbone(config, 64, 4).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(image[:, None]).cls, vit.forward_features(image)[:, 0])
    with pytest.raises(ArtifactError, match="of another model"):
        VisionBackbone(ModelConfig(kwargs={"depth": 3}, pretrained=path), 64, 4)


def test_resized_tables_are_loaded() -> None:
    small = VisionBackbone(ModelConfig(kwargs={"depth": 1}), 32, 4)
    large = VisionBackbone(ModelConfig(kwargs={"depth": 1}), 64, 8)
    load_adapted(large, small.state_dict(), "small")
    assert torch.equal(large.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    expected = F.interpolate(
        F.pad(small.pos_temporal, (0, 0, 1, 0)).transpose(1, 2),
        4,
        mode="linear",
        align_corners=True,
    )
    assert torch.allclose(large.pos_temporal, expected.transpose(1, 2)[:, 1:])
