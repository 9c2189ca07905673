"""Tests of backbones that pool their tokens by attention or by the mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
from plain_vit import plain_evit, plain_tome
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xray.config import ModelConfig
from xray.errors import ArtifactError, ConfigError
from xray.models import VisionBackbone
from xray.models.flops import vision_macs
from xray.models.timm_vit import GLOBAL_POOL
from xray.models.weight_loading import load_adapted

Pool = Literal["map", "mean"]
POOLS: tuple[Pool, ...] = ("map", "mean")
SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 4}
SIGLIP = "vit_base_patch16_siglip_224"
PREFIX = [{}, {"reg_tokens": 3}]  # without prefix tokens, and with registers only


def backbone(pool: Pool, reduce: str = "evit", **more: Any) -> VisionBackbone:
    torch.manual_seed(0)
    kwargs = {**SMALL, **more.pop("kwargs", {})}
    config = ModelConfig(name=SIGLIP, kwargs=kwargs, pool=pool, reduce=reduce, **more)  # type: ignore[arg-type]
    model = VisionBackbone(config, 64, 4)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def pair(name: str, size: int, pool: Pool, **kwargs: Any) -> tuple[Any, VisionBackbone]:
    """Make timm's model for any image size, and a backbone with the same random weights."""
    torch.manual_seed(0)
    theirs = {**SMALL, **kwargs, "global_pool": GLOBAL_POOL[pool]}
    vit = timm.create_model(
        name, num_classes=0, img_size=size, dynamic_img_size=True, **theirs
    ).eval()
    for parameter in vit.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    config = ModelConfig(name=name, kwargs={**SMALL, **kwargs}, pool=pool)
    model = VisionBackbone(config, size, 4).eval()
    state = {**vit.state_dict(), "pos_temporal": torch.randn_like(model.pos_temporal)}
    load_adapted(model, state, "timm")
    return vit, model


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("name", "size", "prefix", "kwargs"),
    [
        (SIGLIP, 64, 0, {}),
        ("vit_base_patch16_siglip_gap_224", 64, 0, {}),
        ("vit_so400m_patch14_siglip_378", 56, 0, {"mlp_ratio": 2}),
        ("vit_so150m_patch16_reg4_map_256", 64, 4, {}),
        ("vit_medium_patch16_reg4_gap_256", 64, 4, {}),
        ("vit_small_patch14_reg4_dinov2", 56, 5, {}),
        ("vit_base_patch16_clip_quickgelu_224", 64, 1, {}),
        ("test_vit3", 64, 1, {"num_heads": 2}),  # its head attends to the register
        ("vit_tiny_patch16_224", 64, 0, {"class_token": False}),
    ],
)
@torch.no_grad()
def test_features_of_images_are_timms(
    name: str, size: int, prefix: int, kwargs: dict[str, Any], pool: Pool
) -> None:
    if pool == "mean" and name == "vit_tiny_patch16_224":
        kwargs = {**kwargs, "fc_norm": False}  # the mean of normalised tokens
    vit, model = pair(name, size, pool, **kwargs)
    assert model.num_prefix_tokens == prefix and not model.cls_added
    assert (model.attn_pool is not None) == (pool == "map")
    for side in (size, size + 2 * model.patch_size[0]):
        image = torch.randn(2, 3, side, side)
        tokens = model(image[:, None])
        torch.testing.assert_close(tokens.cls, vit(image), rtol=0, atol=1e-5)
        expected = vit.fc_norm(vit.forward_features(image))[:, prefix:]
        torch.testing.assert_close(tokens.patches, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_siglips_features_are_timms_bit_for_bit() -> None:
    vit, model = pair(SIGLIP, 64, "map")
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(image[:, None]).cls, vit(image))


# token reduction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kwargs", PREFIX)
@pytest.mark.parametrize(("frames", "fuse"), [(1, True), (4, True), (4, False)])
def test_evit_equals_a_simple_implementation(
    pool: Pool, kwargs: dict[str, Any], frames: int, fuse: bool
) -> None:
    model = backbone(pool, fuse=fuse, kwargs=kwargs).double()
    pixels = torch.randn(3, frames, 3, 64, 64, dtype=torch.float64)
    grads = []
    for run in (
        lambda: model(pixels, [0.9, 0.6, 0.4]).cls,
        lambda: plain_evit(model, pixels, [0.9, 0.6, 0.4], fuse),
    ):
        model.zero_grad()
        out = run()
        out.square().sum().backward()
        grads.append((out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    assert len(grads[0]) == len(grads[1])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-8)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kwargs", PREFIX)
@pytest.mark.parametrize("frames", [1, 4])
@torch.no_grad()
def test_tome_equals_a_simple_implementation(
    pool: Pool, kwargs: dict[str, Any], frames: int
) -> None:
    model = backbone(pool, "tome", kwargs=kwargs).double()
    pixels = torch.randn(3, frames, 3, 64, 80, dtype=torch.float64)
    for rate in (0.8, 0.55):
        expected = plain_tome(model, pixels, rate)
        torch.testing.assert_close(model(pixels, rate).cls, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kwargs", PREFIX)
@pytest.mark.parametrize("reduce", ["evit", "tome", "random", "none"])
@torch.no_grad()
def test_macs_equal_torchs_flop_counter(pool: Pool, kwargs: dict[str, Any], reduce: str) -> None:
    model = backbone(pool, reduce, kwargs=kwargs).requires_grad_(False)
    for frames in (1, 4):
        for rate in (1.0, 0.6)[: 1 if reduce == "none" else 2]:
            counter = FlopCounterMode(display=False)
            with counter, sdpa_kernel(SDPBackend.MATH):
                model(torch.randn(1, frames, 3, 64, 80), rate)
            # once per batch: the latent query and its product with the key weights
            scored = reduce in ("evit", "random") and rate < 1
            query = 2 * 64 * 64 if pool == "map" and scored else 0
            counted = counter.get_total_flops() // 2 - query
            assert counted == vision_macs(model, frames, (64, 80), rate)


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_frames_masks_and_dense_features(pool: Pool) -> None:
    clip = torch.randn(2, 3, 3, 64, 64)
    frames = backbone(pool, video="frames")
    each = torch.stack([frames(clip[:, i : i + 1], 0.6).cls for i in range(3)])
    tokens = frames(clip, 0.6, track=True)
    torch.testing.assert_close(tokens.cls, each.mean(0), rtol=0, atol=1e-5)
    assert tokens.dense().shape == (2, 48, 64)
    model = backbone(pool)
    for reduce in ("evit", "tome", "random"):
        model.reduction = reduce
        assert model(clip, 0.6, track=True).dense().shape == (2, 32, 64)
    visible = torch.tensor([[3, 0, 17, 30], [1, 2, 3, 20]])
    seen = model(clip, visible=visible)
    assert seen.patches.shape == (2, 4, 64)
    # the order of visible patches does not matter to the feature
    torch.testing.assert_close(model(clip, visible=visible.flip(1)).cls, seen.cls)
    assert (model(clip, visible=visible + 1).cls - seen.cls).abs().max() > 1e-3
    features = model.forward_features(clip, 0.6)
    assert features.shape == (2, 1 + model.token_counts(32, 0.6)[-1], 64)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("reduce", ["evit", "tome"])
def test_checkpointing_bf16_and_compilation(pool: Pool, reduce: str) -> None:
    model, pixels, grads = backbone(pool, reduce).train(), torch.randn(2, 4, 3, 64, 64), []
    for checkpointing in (False, True, "mlp"):
        model.set_grad_checkpointing(checkpointing)  # type: ignore[arg-type]
        model.zero_grad()
        model(pixels, 0.7).cls.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len([*model.parameters()])  # every parameter is used
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            assert torch.allclose(one, two, atol=1e-5)
    model.set_grad_checkpointing(False)
    model.eval()
    exact = model(pixels, 0.7).cls
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(pixels, 0.7).cls.float()
    assert torch.nn.functional.cosine_similarity(rounded, exact).min() > 0.98
    if reduce == "tome":
        return
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    assert torch.allclose(compiled(pixels, 0.7).cls, exact, atol=1e-5)


def test_images_use_the_positions_of_clips_in_training() -> None:
    model = backbone("mean").train()
    model(torch.randn(1, 1, 3, 64, 64)).cls.sum().backward()
    assert model.pos_temporal.grad is not None and not model.pos_temporal.grad.any()


# weights and settings ----------------------------------------------------------------------------


def test_pretrained_weights_bring_the_pooling_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(SIGLIP, img_size=64, **SMALL).eval()
    path = f"{tmp_path}/siglip.safetensors"
    save_file(vit.state_dict(), path)
    config = ModelConfig(name=SIGLIP, kwargs=dict(SMALL), pool="map", pretrained=path)
    image = torch.randn(1, 3, 64, 64)
    expected = vit.forward_head(vit.forward_features(image), pre_logits=True)
    assert torch.equal(VisionBackbone(config, 64, 1).eval()(image[:, None]).cls, expected)
    config.pool = "cls"  # as before: a CLS token is added, the head is dropped
    assert VisionBackbone(config, 64, 1).attn_pool is None
    config.pool = "mean"  # its norm then follows the mean
    mean = VisionBackbone(config, 64, 1)
    assert torch.equal(mean.fc_norm.weight, vit.norm.weight) and mean.cls_token is None
    headless = {k: v for k, v in vit.state_dict().items() if not k.startswith("attn_pool.")}
    save_file(headless, path)
    config.pool = "map"
    with pytest.raises(ArtifactError, match=r"attn_pool.latent is missing .*and model.pool to"):
        VisionBackbone(config, 64, 1)


def test_a_timm_folder_brings_the_pooling_head(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    vit = timm.create_model(SIGLIP, img_size=32, num_classes=0, depth=1)
    save_for_hf(vit, f"{tmp_path}", safe_serialization=True)
    config = ModelConfig(
        name=SIGLIP, kwargs={"depth": 1}, pool="map", pretrained=f"local-dir:{tmp_path}"
    )
    model = VisionBackbone(config, 32, 1)
    assert model.attn_pool is not None
    assert torch.equal(model.attn_pool.latent, vit.attn_pool.latent)


def test_a_contradicting_pool_is_refused() -> None:
    kwargs = {**SMALL, "global_pool": "avg"}
    with pytest.raises(ConfigError, match=r"kwargs.global_pool=avg contradicts model.pool=map"):
        VisionBackbone(ModelConfig(kwargs=kwargs, pool="map"), 64, 1)
    assert VisionBackbone(ModelConfig(kwargs=kwargs, pool="mean"), 64, 1).cls_token is not None


def test_the_latent_query_is_not_decayed() -> None:
    from xray.config import OptimConfig
    from xray.optim import parameter_groups

    tower = torch.nn.Module()
    tower.towers = torch.nn.ModuleDict({"vision": backbone("map")})
    groups = parameter_groups(tower, OptimConfig())
    latent = tower.towers["vision"].attn_pool.latent
    (group,) = [g for g in groups if any(p is latent for p in g["params"])]
    assert group["weight_decay"] == 0
