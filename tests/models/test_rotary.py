"""Tests of timm's Eva models as the backbone: rotary positions, SwiGLU, token reduction, clips."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
from plain_vit import merge
from safetensors.torch import save_file
from timm.layers import apply_rot_embed_cat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xray.config import ModelConfig
from xray.models import VisionBackbone
from xray.models.flops import vision_macs
from xray.models.weight_loading import load_adapted

Pool = Literal["cls", "map", "mean"]
SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 4}
GLOBAL_POOL = {"cls": "token", "map": "map", "mean": "avg"}
# name, patch size, pooling
MODELS: list[tuple[str, int, Pool]] = [
    ("eva02_tiny_patch14_224", 14, "mean"),  # packed SwiGLU, one projection with two biases
    ("eva02_base_patch14_224", 14, "cls"),  # SwiGLU with a norm, three projections
    ("eva02_base_patch16_clip_224", 16, "cls"),  # norm in the attention
    ("vit_small_patch16_dinov3", 16, "cls"),  # no learned positions, registers, LayerScale
    ("vit_small_patch16_dinov3_qkvb", 16, "mean"),
    ("vit_huge_plus_patch16_dinov3", 16, "cls"),  # SwiGLU
    ("vit_pe_core_tiny_patch16_384", 16, "map"),  # its head attends to CLS too
    ("vit_pe_core_gigantic_patch14_448", 14, "map"),  # no prefix token
    ("vit_pe_lang_large_patch14_448", 14, "mean"),  # no final norm
    ("vit_medium_patch16_rope_reg1_gap_256", 16, "mean"),
    ("eva_giant_patch14_224", 14, "cls"),  # no rotary positions
]
FAMILIES = [MODELS[1], MODELS[3], MODELS[6]]


def pair(name: str, patch: int, pool: Pool, **more: Any) -> tuple[Any, VisionBackbone]:
    """Make timm's model for any image size, and a backbone with the same random weights."""
    torch.manual_seed(0)
    kwargs = {**SMALL, "global_pool": GLOBAL_POOL[pool]}
    vit = timm.create_model(
        name, num_classes=0, img_size=4 * patch, dynamic_img_size=True, **kwargs
    ).eval()
    for parameter in vit.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    config = ModelConfig(name=name, kwargs=kwargs, pool=pool, **more)
    model = VisionBackbone(config, 4 * patch, 4).eval()
    load_adapted(model, vit.state_dict(), "timm")
    if model.pos_temporal is not None:
        model.pos_temporal.data.normal_()
    return vit, model


@pytest.mark.parametrize(("name", "patch", "pool"), [MODELS[0], MODELS[4]])
def test_a_file_of_timms_weights_is_not_taken_for_videomaes(
    name: str, patch: int, pool: Pool, tmp_path: Path
) -> None:
    """Their attention has biases of queries and values only, as VideoMAE's has."""
    vit, file = pair(name, patch, pool)[0], tmp_path / "model.safetensors"
    save_file(vit.state_dict(), file)
    config = ModelConfig(name=name, kwargs=SMALL, pool=pool, pretrained=str(file))
    model = VisionBackbone(config, 4 * patch, 1)
    torch.testing.assert_close(
        model.state_dict()["blocks.0.attn.q_bias"], vit.blocks[0].attn.q_bias
    )


@pytest.mark.parametrize(("name", "patch", "pool"), MODELS)
@torch.no_grad()
def test_features_of_images_are_timms_and_macs_are_counted(
    name: str, patch: int, pool: Pool
) -> None:
    vit, model = pair(name, patch, pool)
    model.requires_grad_(False)
    assert not [*model.buffers()]  # artifacts store parameters, not buffers
    for sides in ((4 * patch, 4 * patch), (6 * patch, 5 * patch)):
        image = torch.randn(2, 3, *sides)
        torch.testing.assert_close(model(image[:, None]).cls, vit(image), rtol=0, atol=1e-5)
    for frames, rate in ((1, 1.0), (1, 0.7), (4, 0.7)):
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            tokens = model(torch.randn(1, frames, 3, *sides), rate, track=True)
        # once per batch: the latent query and its product with the key weights
        query = 2 * 64 * 64 if pool == "map" and rate < 1 else 0
        counted = counter.get_total_flops() // 2 - query
        assert counted == vision_macs(model, frames, sides, rate)
        assert tokens.dense().shape == (1, 30 * -(-frames // 2), 64)


def plain_rotary(vit: Any, image: Tensor, at: list[int], rate: float, tome: bool) -> Tensor:
    """Encode an image [1, 3, H, W] with token reduction in timm's model: tokens [N, D].

    Each token carries its rotary position. The fused token of EViT has none; a merged token of ToMe
    has that of its token at an odd place.
    """
    x, rope = vit._pos_embed(vit.patch_embed(image))
    x, P = vit.norm_pre(x)[0], vit.num_prefix_tokens
    sizes = x.new_ones(len(x))
    for number, block in enumerate(vit.blocks):
        attn, y = block.attn, block.norm1(x)
        if attn.qkv is None:
            parts = [layer(y) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
        else:
            parts = list(attn.qkv(y).chunk(3, dim=-1))
            if getattr(attn, "q_bias", None) is not None:
                parts = [parts[0] + attn.q_bias, parts[1], parts[2] + attn.v_bias]
        q, k, v = (part.unflatten(1, (attn.num_heads, -1)).transpose(0, 1) for part in parts)
        for part in (q, k):
            part[:, P:] = apply_rot_embed_cat(part[:, P:].clone(), rope, half=attn.rotate_half)
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + sizes.log()
        weights = logits.softmax(-1)
        out = attn.proj(attn.norm((weights @ v).transpose(0, 1).flatten(1)))
        x = x + (out if block.gamma_1 is None else block.gamma_1 * out)
        if number in at and tome:
            x, sizes, groups = merge(x, sizes, k.mean(0), P, rate)
            rope = rope[[group[0] - P for group in groups[P:]]]
        elif number in at:
            score = weights[:, 0, P:].mean(0)
            order = score.argsort(descending=True)
            kept, rest = order.tensor_split([math.ceil(rate * len(order) - 1e-6)])
            fused = (score[rest, None] * x[P:][rest]).sum(0, keepdim=True)
            x = torch.cat([x[:P], x[P:][kept], fused])
            none = torch.cat([torch.zeros(1, q.shape[-1]), torch.ones(1, q.shape[-1])], dim=1)
            rope = torch.cat([rope[kept], none.to(rope)])
            sizes = x.new_ones(len(x))
        out = block.mlp(block.norm2(x))
        x = x + (out if block.gamma_2 is None else block.gamma_2 * out)
    return vit.fc_norm(vit.norm(x))


@pytest.mark.parametrize(("name", "patch", "pool"), FAMILIES)
@pytest.mark.parametrize("reduce", ["evit", "tome"])
@torch.no_grad()
def test_remaining_tokens_keep_their_rotary_positions(
    name: str, patch: int, pool: Pool, reduce: str
) -> None:
    vit, model = pair(name, patch, "cls", reduce=reduce)
    vit, model = vit.double(), model.double()
    images = torch.randn(2, 3, 6 * patch, 5 * patch, dtype=torch.float64)
    found = model(images[:, None], 0.7).cls
    for image, feature in zip(images, found, strict=True):
        expected = plain_rotary(vit, image[None], model.reduce_at, 0.7, reduce == "tome")
        torch.testing.assert_close(feature, expected[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_rotary_positions_are_the_same_in_each_time_slot() -> None:
    _, model = pair("vit_pe_core_gigantic_patch14_448", 14, "map")
    image, clip = torch.randn(2, 1, 3, 56, 56), torch.randn(2, 4, 3, 56, 56)
    assert (model(clip).cls - model(clip.flip(1)).cls).abs().max() > 1e-3
    model.pos_temporal.zero_()
    # without prefix tokens, doubled tokens do not change any attention
    still = model(image.expand(-1, 4, -1, -1, -1)).cls
    torch.testing.assert_close(still, model(image).cls, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "patch", "pool"), FAMILIES)
@torch.no_grad()
def test_visible_patches_keep_their_rotary_positions(name: str, patch: int, pool: Pool) -> None:
    _, model = pair(name, patch, pool)
    clip = torch.randn(2, 4, 3, 4 * patch, 4 * patch)
    order = torch.stack([torch.randperm(32) for _ in range(2)])
    expected = model(clip)
    shuffled = model(clip, visible=order)
    torch.testing.assert_close(shuffled.cls, expected.cls, rtol=0, atol=1e-5)
    index = order[..., None].expand(-1, -1, 64)
    torch.testing.assert_close(
        shuffled.patches, expected.patches.gather(1, index), rtol=0, atol=1e-5
    )
    model.video = "frames"
    frames = torch.stack([model(clip[:, i : i + 1], 0.7).cls for i in range(4)])
    torch.testing.assert_close(model(clip, 0.7).cls, frames.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "patch", "pool"), FAMILIES)
def test_checkpointing_bf16_and_compilation(name: str, patch: int, pool: Pool) -> None:
    _, model = pair(name, patch, pool)
    pixels, grads = torch.randn(2, 4, 3, 4 * patch, 4 * patch), []
    for checkpointing in (False, True, "mlp"):
        model.train().set_grad_checkpointing(checkpointing)  # type: ignore[arg-type]
        model.zero_grad()
        model(pixels, 0.7).cls.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len([*model.parameters()])
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            assert torch.allclose(one, two, atol=1e-5 * float(one.abs().max() + 1))
    model.eval().set_grad_checkpointing(False)
    exact = model(pixels, 0.7).cls
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(pixels, 0.7).cls.float()
    assert torch.nn.functional.cosine_similarity(rounded, exact).min() > 0.98
    if pool == "map":  # one family: each takes seconds
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        assert torch.allclose(compiled(pixels, 0.7).cls, exact, atol=1e-5)


def test_pretrained_weights_of_dinov3(tmp_path: Path) -> None:
    name = "vit_small_patch16_dinov3"
    vit = timm.create_model(name, img_size=64, global_pool="token", **SMALL).eval()
    path = f"{tmp_path}/dinov3.safetensors"
    save_file(vit.state_dict(), path)
    model = VisionBackbone(ModelConfig(name=name, kwargs=dict(SMALL), pretrained=path), 64, 1)
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.eval()(image[:, None]).cls, vit(image), rtol=0, atol=1e-5)
