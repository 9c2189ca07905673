"""Tests of the backbone against timm: weights, image sizes, clips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from xray.config import ModelConfig
from xray.errors import ArtifactError, ConfigError
from xray.models import VisionBackbone
from xray.models.token_reduction import kept_tokens, rate_at
from xray.models.weight_loading import load_adapted

# Keywords with which timm itself adds a CLS token to a model without one: the reference.
CLS = {"class_token": True, "no_embed_class": True}


def pair(name: str, size: int, **kwargs: object) -> tuple[torch.nn.Module, VisionBackbone]:
    """Return timm's model, and a backbone with the same weights, loaded from its state dict."""
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, img_size=size, **kwargs).eval()
    for parameter in vit.parameters():  # tables that are all zero would hide mistakes
        parameter.data += 0.02 * torch.randn_like(parameter)
    kwargs = {key: value for key, value in kwargs.items() if key not in CLS}
    model = VisionBackbone(ModelConfig(name=name, kwargs=kwargs), size, 4).eval()
    state = {k: v for k, v in vit.state_dict().items() if not k.startswith("attn_pool.")}
    state["pos_temporal"] = torch.randn_like(model.pos_temporal)
    load_adapted(model, state, "timm")
    return vit, model


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("vit_tiny_patch16_224", 64, {}),
        ("vit_tiny_patch16_224", 64, {"qk_norm": True, "init_values": 0.1}),
        ("vit_small_patch14_reg4_dinov2", 56, {}),
        ("vit_base_patch32_clip_224", 64, {"depth": 3}),
        ("deit3_small_patch16_224", 48, {"depth": 3}),
        ("vit_base_patch8_224", 32, {"depth": 2}),
        ("vit_giant_patch14_reg4_dinov2", 28, {"depth": 2}),  # SwiGLU
        ("vit_so400m_patch14_siglip_378", 42, {"depth": 2} | CLS),
        ("vit_base_patch16_siglip_256", 32, {"depth": 2} | CLS),
        ("vit_medium_patch16_reg4_gap_256", 32, {"depth": 2} | CLS),
        ("eva_large_patch14_196", 28, {"depth": 2}),  # its final norm is fc_norm
    ],
)
@torch.no_grad()
def test_keep_rate_1_is_timm_bit_for_bit(name: str, size: int, kwargs: dict) -> None:
    vit, model = pair(name, size, **kwargs)
    image = torch.randn(2, 3, size, size)
    tokens = model(image[:, None])
    expected = vit.fc_norm(vit.forward_features(image))
    assert torch.equal(tokens.cls, expected[:, 0])
    assert torch.equal(tokens.patches, expected[:, model.num_prefix_tokens :])


@torch.no_grad()
def test_clip_of_equal_frames_equals_the_image() -> None:
    _, model = pair("vit_tiny_patch16_224", 64)
    image = torch.randn(2, 1, 3, 64, 64)
    difference = model(image).cls - model(image.expand(-1, 2, -1, -1, -1)).cls
    assert difference.abs().max() < 1e-5


@torch.no_grad()
def test_output_of_longer_clips_depends_on_frame_order() -> None:
    _, model = pair("vit_tiny_patch16_224", 64)
    clip = torch.randn(1, 4, 3, 64, 64)
    assert model(clip).patches.shape[1] == 2 * 16
    assert (model(clip).cls - model(clip.flip(1)).cls).abs().max() > 1e-3


@torch.no_grad()
def test_other_sizes_interpolate_positions() -> None:
    vit, model = pair("vit_tiny_patch16_224", 64)
    dynamic = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=64, dynamic_img_size=True
    ).eval()
    dynamic.load_state_dict(vit.state_dict())
    image = torch.randn(1, 3, 96, 48)
    assert torch.allclose(
        model.forward_features(image[:, None]), dynamic.forward_features(image), atol=1e-5
    )
    assert model(torch.randn(1, 8, 3, 64, 64)).patches.shape[1] == 4 * 16
    with pytest.raises(ConfigError, match=r"50 pixels .* not a multiple of the patch size 16"):
        model(torch.randn(1, 1, 3, 64, 50))


@torch.no_grad()
def test_position_table_that_is_not_square() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(64, 32), depth=2)
    model = VisionBackbone(ModelConfig(kwargs={"depth": 2}), (64, 32), 1).eval()
    load_adapted(model, vit.state_dict(), "timm")
    image = torch.randn(1, 3, 64, 32)
    assert torch.equal(model.forward_features(image[:, None]), vit.eval().forward_features(image))


@torch.no_grad()
def test_last_frame_is_repeated_to_complete_its_tubelet() -> None:
    _, model = pair("vit_tiny_patch16_224", 64)
    clip = torch.randn(1, 5, 3, 64, 64)
    assert torch.equal(model(clip).cls, model(torch.cat([clip, clip[:, -1:]], 1)).cls)
    assert model.token_grid(clip) == (3, 4, 4)
    assert torch.equal(model.tubelets(clip)[:, 5], clip[:, 4])


@torch.no_grad()
def test_registers_keep_their_positions_when_a_cls_is_added() -> None:
    name = "vit_little_patch16_reg1_gap_256"
    vit = timm.create_model(name, img_size=64, no_embed_class=False, depth=1).eval()
    config = ModelConfig(name=name, kwargs={"no_embed_class": False, "depth": 1})
    model = VisionBackbone(config, 64, 1).eval()
    state = {k: v for k, v in vit.state_dict().items() if not k.startswith("head.")}
    load_adapted(model, state, "timm")
    image = torch.randn(1, 3, 64, 64)
    expected = vit._pos_embed(vit.patch_embed(image))
    assert torch.equal(model.embed(image[:, None])[:, 1:], expected)
    assert torch.equal(model.embed(image[:, None])[:, 0], model.cls_token[0])


def test_kept_tokens_tolerates_rounding() -> None:
    assert math.ceil(0.55 * 100) == 56 and kept_tokens(100, 0.55) == 55


def test_keep_rate_falls_in_steps_to_its_target() -> None:
    rates = [rate_at(p / 100, 0.7, 8, [0.2, 0.6]) for p in range(101)]
    assert rates[0] == rates[20] == 1 and rates[60] == rates[100] == 0.7
    assert sorted(rates, reverse=True) == rates and len(set(rates)) == 9


UNSUPPORTED = {
    "resnet18": "cannot build|not its VisionTransformer",
    "vit_tiny_patch61": r"is not a model of timm; did you mean",
    "beit_base_patch16_224": "it is timm's Beit",
    "eva02_enormous_patch14_clip_224": "its blocks are EvaBlockPostNorm",
    "vit_small_patch16_rope_mixed_224": "its rotary positions are RotaryEmbeddingMixed",
    "vit_base_patch16_sapiens2": "it changes its rotary positions at random",
    "vit_small_patch16_18x2_224": "its blocks are ParallelThingsBlock",
    "vit_base_patch16_rpn_224": "its blocks are ResPostBlock",
    "deit_tiny_distilled_patch16_224": "it is timm's VisionTransformerDistilled",
    "vit_dwee_patch16_reg1_gap_256": "its attention is DiffAttention",
    "vit_tiny_r_s16_p8_224": "not its VisionTransformer|its stem is",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_raise_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=UNSUPPORTED[name]), torch.device("meta"):
        VisionBackbone(ModelConfig(name=name), 32, 4)
    with pytest.raises(ConfigError, match=r"kwargs.img_size is not .*: set data.resolution"):
        VisionBackbone(ModelConfig(kwargs={"img_size": 32}), 32, 4)


@pytest.mark.slow
def test_every_vision_transformer_of_timm_is_built_or_rejected_with_a_reason() -> None:
    rejected, names = {}, timm.list_models(module="vision_transformer")
    names += timm.list_models(module="eva")
    for name in names:
        try:
            with torch.device("meta"):
                backbone = VisionBackbone(ModelConfig(name=name), 224 // 14 * 16 * 14, 4)
            assert not [*backbone.buffers()], name  # artifacts store parameters, not buffers
        except ConfigError as error:
            rejected[name] = str(error)
    reasons = ("its blocks are", "its attention is", "its rotary positions", "it changes")
    assert all(any(r in error for r in reasons) for error in rejected.values()), rejected
    assert set(UNSUPPORTED) & set(names) <= rejected.keys()
    assert len(rejected) < len(names) / 10


# clips encoded frame by frame -------------------------------------------------------------------


def frame_backbone(pool: str, **kwargs: object) -> VisionBackbone:
    torch.manual_seed(0)
    config = ModelConfig(kwargs={"depth": 4}, video="frames", frame_pool=pool, **kwargs)  # type: ignore[arg-type]
    return VisionBackbone(config, 64, 4).eval()


@torch.no_grad()
def test_frames_are_encoded_separately_and_averaged() -> None:
    model = frame_backbone("mean")
    clip = torch.randn(2, 3, 3, 64, 64)
    each = torch.stack([model(clip[:, i : i + 1]).cls for i in range(3)])
    assert torch.allclose(model(clip).cls, each.mean(0), atol=1e-6)
    assert model(clip).patches.shape == (2, 3 * 16, 192) and model.token_grid(clip) == (3, 4, 4)
    image = clip[:, :1]
    assert torch.allclose(model(image).cls, model(image.expand(-1, 8, -1, -1, -1)).cls, atol=1e-6)


def test_attention_pooling_starts_as_the_mean_and_learns() -> None:
    model, mean = frame_backbone("attention"), frame_backbone("mean")
    clip = torch.randn(2, 3, 3, 64, 64)
    assert torch.allclose(model(clip).cls, mean(clip).cls, atol=1e-6)
    query = torch.randn(192)
    model.frame_query.data = query.clone()
    each = torch.stack([model(clip[:, i : i + 1]).cls for i in range(3)], dim=1)
    weights = (each @ query / math.sqrt(192)).softmax(1)
    assert torch.allclose(model(clip).cls, (weights[..., None] * each).sum(1), atol=1e-5)
    model(clip).cls.sum().backward()
    assert model.frame_query.grad.abs().max() > 0


@torch.no_grad()
def test_frames_are_reduced_and_masked_like_images() -> None:
    model = frame_backbone("mean")
    clip = torch.randn(2, 3, 3, 64, 64)
    tokens = model(clip, 0.5, track=True)
    frame = model(clip[:, 1:2], 0.5, track=True)
    for depth in range(3):
        remaining = model.token_counts(16, 0.5)[model.reduce_at[depth]]
        assert torch.equal(tokens.assign[depth][:, 16:32], frame.assign[depth] + remaining)
    assert torch.allclose(tokens.dense()[:, 16:32], frame.dense(), atol=1e-5)
    visible = torch.tensor([[0, 3, 18, 17, 47, 40]]).expand(2, -1)
    masked = model(clip, visible=visible)
    alone = model(clip[:, 1:2], visible=torch.tensor([[2, 1]]).expand(2, -1))
    assert torch.allclose(masked.patches[:, 2:4], alone.patches, atol=1e-5)


# weights ----------------------------------------------------------------------------------------


def test_weights_convert_between_joint_and_frames() -> None:
    joint = VisionBackbone(ModelConfig(kwargs={"depth": 1}), 64, 4)
    frames = frame_backbone("attention")
    frames.blocks = frames.blocks[:1]
    load_adapted(frames, joint.state_dict(), "joint")
    assert frames.frame_query.abs().max() == 0
    load_adapted(joint, frames.state_dict(), "frames")
    assert joint.pos_temporal.abs().max() == 0


def test_pretrained_from_a_timm_folder(tmp_path: object) -> None:
    from timm.models import save_for_hf

    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_siglip_224", img_size=32, depth=1).eval()
    save_for_hf(vit, f"{tmp_path}", safe_serialization=True)
    config = ModelConfig(
        name="vit_base_patch16_siglip_224", kwargs={"depth": 1}, pretrained=f"local-dir:{tmp_path}"
    )
    model = VisionBackbone(config, 64, 1).eval()
    assert torch.equal(model.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)
    config.pretrained = "local-dir:nowhere"
    with pytest.raises(ConfigError, match=r"timm finds no weights for model.pretrained=local-dir"):
        VisionBackbone(config, 64, 1)
    config.pretrained = "missing.safetensors"
    with pytest.raises(ConfigError, match=r"missing.safetensors is not a file"):
        VisionBackbone(config, 64, 1)


def test_pretrained_from_a_file(tmp_path: object) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    path = f"{tmp_path}/vit.safetensors"
    save_file(vit.state_dict(), path)
    config = ModelConfig(kwargs={"depth": 2}, pretrained=path)
    model = VisionBackbone(config, 64, 4).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(image[:, None]).cls, vit.forward_features(image)[:, 0])
    with pytest.raises(ArtifactError, match="of another model"):
        VisionBackbone(ModelConfig(kwargs={"depth": 3}, pretrained=path), 64, 4)


@pytest.mark.parametrize("resize", ["antialias", "plain"])
def test_position_tables_are_resized_as_asked(resize: Any) -> None:
    """`plain` is what MAE, EViT and SWAG do; both differ more, the more the table shrinks."""
    config = ModelConfig(kwargs={"depth": 1}, resize_positions=resize)
    torch.manual_seed(0)
    model = VisionBackbone(config, 112, 1).eval()
    table = model.pos_embed.data.normal_()
    grid = table[:, 1:].unflatten(1, (7, 7)).permute(0, 3, 1, 2)

    def expected(side: int, antialias: bool) -> torch.Tensor:
        resized = F.interpolate(grid, (side, side), mode="bicubic", antialias=antialias)
        return resized.flatten(2).transpose(1, 2)

    small = VisionBackbone(config, 64, 1)
    load_adapted(small, model.state_dict(), "model")
    own = expected(4, antialias=resize == "antialias")
    other = expected(4, antialias=resize == "plain")
    assert torch.allclose(small.pos_embed[:, 1:], own, atol=1e-6)
    assert (own - other).norm() > 0.3 * other.norm()
    with torch.no_grad():
        embedded = model.embed(torch.zeros(1, 1, 3, 64, 64))[:, 1:]
    bias = model.patch_embed.proj.bias
    assert torch.allclose(embedded - bias, own, atol=1e-5)


def test_position_tables_are_resized_on_loading() -> None:
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
