"""Published checkpoints of MAE and VideoMAE, against transformers' forward of the same weights."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_vit import mae_table
from safetensors.torch import save_file
from tiny import settings
from torch import Tensor
from transformers import (
    VideoMAEConfig,
    VideoMAEModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from stages.base import Parents
from stages.mae import MaeModule, MaeStage
from xray.config import ModelConfig
from xray.errors import ArtifactError, ConfigError
from xray.models import VisionBackbone
from xray.models.mae_checkpoints import published, read_weights, sinusoid_table
from xray.models.weight_loading import load_adapted

SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 32, 2, 2
SIZES = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS,
         "mlp_ratio": 2.0}  # fmt: skip
DECODER = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
# Our names of a block's parts, and those of transformers before and since version 5.24.
LAYER = {
    "norm1": ("layernorm_before",) * 2,
    "norm2": ("layernorm_after",) * 2,
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
QKV = [(f"attention.attention.{old}", f"attention.{new}_proj")
       for old, new in (("query", "q"), ("key", "k"), ("value", "v"))]  # fmt: skip


def noisy(module: torch.nn.Module) -> Any:
    """Move all trained weights away from their initial values, such as biases of 0."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()


def block(state: Mapping[str, Tensor], theirs: str, ours: str, joined: bool) -> dict[str, Tensor]:
    """Name a block of transformers as its authors do; joined: one bias of queries, keys, values."""
    own: dict[str, Tensor] = {}

    def find(names: tuple[str, str], leaf: str) -> Tensor:
        return next(state[key] for x in names if (key := f"{theirs}.{x}.{leaf}") in state)

    for leaf in ("weight", "bias"):
        for new, names in LAYER.items():
            own[f"{ours}.{new}.{leaf}"] = find(names, leaf)
    own[f"{ours}.attn.qkv.weight"] = torch.cat([find(names, "weight") for names in QKV])
    if joined:
        own[f"{ours}.attn.qkv.bias"] = torch.cat([find(names, "bias") for names in QKV])
    else:
        own[f"{ours}.attn.q_bias"], own[f"{ours}.attn.v_bias"] = (
            find(QKV[0], "bias"),
            find(QKV[2], "bias"),
        )
    return own


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    leaves = ("", ".weight", ".bias")
    return {n + x: state[o + x] for o, n in names.items() for x in leaves if o + x in state}


@pytest.fixture(scope="module")
def mae() -> tuple[ViTMAEForPreTraining, dict[str, Tensor]]:
    """A model of transformers, and its weights as MAE's authors name them."""
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=SIDE, patch_size=PATCH, hidden_size=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, intermediate_size=2 * WIDTH, layer_norm_eps=1e-6,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, mask_ratio=0.75, norm_pix_loss=True,
    )  # fmt: skip
    model = noisy(ViTMAEForPreTraining(config))
    # transformers fills the decoder's fixed table from a checkpoint only
    model.decoder.decoder_pos_embed.data[0, 1:] = torch.from_numpy(mae_table(4, 16)).float()
    state = model.state_dict()
    own = renamed(
        state,
        {
            "vit.embeddings.cls_token": "cls_token",
            "vit.embeddings.position_embeddings": "pos_embed",
            "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
            "vit.layernorm": "norm",
            "decoder.mask_token": "mask_token",
            "decoder.decoder_pos_embed": "decoder_pos_embed",
            "decoder.decoder_embed": "decoder_embed",
            "decoder.decoder_norm": "decoder_norm",
            "decoder.decoder_pred": "decoder_pred",
        },
    )
    for number in range(DEPTH):
        layers = "vit.layers" if "vit.layers.0.layernorm_before.weight" in state else None
        layers = layers or "vit.encoder.layer"
        own |= block(state, f"{layers}.{number}", f"blocks.{number}", True)
        own |= block(state, f"decoder.decoder_layers.{number}", f"decoder_blocks.{number}", True)
    return model, {name: tensor.contiguous() for name, tensor in own.items()}


def mae_module(file: Path, tubelet: int, *more: str) -> MaeModule:
    given = [f"model.kwargs.{key}={value}" for key, value in SIZES.items()]
    given += [f"mae.{key}={value}" for key, value in DECODER.items()]
    given += [f"model.tubelet={tubelet}", f"model.pretrained={file}"]
    config = settings("mae", Path("."), Path("."), *given, *more)
    return MaeStage(config).build(Parents()).eval()


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@torch.no_grad()
def test_mae_has_the_features_and_the_loss_of_transformers(
    mae: tuple[ViTMAEForPreTraining, dict[str, Tensor]], tubelet: int, ending: str, tmp_path: Path
) -> None:
    theirs, state = mae
    file = tmp_path / f"mae.{ending}"
    if ending == "pth":
        torch.save({"model": state}, file)
    else:
        save_file(state, file)
    module = mae_module(file, tubelet)
    pixels = torch.randint(0, 256, (3, 1, 3, SIDE, SIDE), dtype=torch.uint8)
    noise = torch.rand(3, 16)
    given = module.normalize(pixels)
    expected = theirs(given[:, 0], noise=noise)
    if tubelet == 1:  # an image counts as two equal frames otherwise, whose variance differs
        output = module({"pixels": pixels, "mask_noise": noise}, 0.0)
        assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    whole = theirs.vit(given[:, 0], noise=noise).last_hidden_state
    visible = noise.argsort(dim=1)[:, :4]
    tokens = module.vision(given, visible=visible)
    ours = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5)
    order = noise.argsort(dim=1).argsort(dim=1)
    predicted = module.decoder(tokens.cls, tokens.patches, order, (1, 4, 4))
    for frame in predicted.chunk(tubelet, dim=-1):
        torch.testing.assert_close(frame, expected.logits, rtol=0, atol=1e-5)


def test_nothing_of_mae_is_left_over(
    mae: tuple[ViTMAEForPreTraining, dict[str, Tensor]], tmp_path: Path
) -> None:
    state = mae[1]
    found = published(state, "mae")
    assert len(found.backbone) + len(found.decoder) + 1 == len(state)  # decoder_pos_embed is fixed
    encoder = {k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}
    assert published(encoder, "mae") == (encoder, {}, False)
    other = {**state, "decoder_pos_embed": state["decoder_pos_embed"].roll(8, dims=2)}
    with pytest.raises(ArtifactError, match="decoder_pos_embed is not the sine-cosine table"):
        published(other, "mae")


def test_a_decoder_of_other_sizes_is_left_out(
    mae: tuple[ViTMAEForPreTraining, dict[str, Tensor]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_file(mae[1], tmp_path / "mae.safetensors")
    for change in ("mae.decoder_depth=1", "model.sincos=rows"):
        caplog.clear()
        module = mae_module(tmp_path / "mae.safetensors", 1, change)
        assert "mae.decoder_dim=16, mae.decoder_depth=2, model.sincos=columns" in caplog.text
        assert module.decoder.norm.bias.abs().max() == 0


@pytest.fixture(scope="module")
def videomae() -> tuple[VideoMAEModel, dict[str, Tensor]]:
    """A model of transformers, and its weights as VideoMAE's authors name them."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=SIDE, patch_size=PATCH, num_frames=6, tubelet_size=2, hidden_size=WIDTH,
        num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=2 * WIDTH,
        layer_norm_eps=1e-6, use_mean_pooling=False,
    )  # fmt: skip
    model = noisy(VideoMAEModel(config))
    state = model.state_dict()
    names = {"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}
    own = renamed(state, names)
    for number in range(DEPTH):
        own |= block(state, f"encoder.layer.{number}", f"blocks.{number}", False)
    return model, {name: tensor.contiguous() for name, tensor in own.items()}


def video_config(file: Path, **more: Any) -> ModelConfig:
    kwargs = {**SIZES, "class_token": False, "fc_norm": False}
    more = {"pool": "mean", "clip_positions": "tokens", **more}
    return ModelConfig(kwargs=kwargs, pretrained=str(file), **more)


@pytest.mark.parametrize("prefix", ["", "encoder."])
@torch.no_grad()
def test_videomae_has_the_features_of_transformers(
    videomae: tuple[VideoMAEModel, dict[str, Tensor]], prefix: str, tmp_path: Path
) -> None:
    theirs, state = videomae
    state = {prefix + name: tensor for name, tensor in state.items()}
    if prefix:  # of pre-training
        state |= {"decoder.norm.weight": torch.ones(4), "mask_token": torch.ones(1, 1, 4)}
        state["encoder_to_decoder.weight"] = torch.ones(4, WIDTH)
    else:
        state |= {"head.weight": torch.ones(5, WIDTH), "head.bias": torch.ones(5)}
    save_file(state, tmp_path / "videomae.safetensors")
    model = VisionBackbone(video_config(tmp_path / "videomae.safetensors"), SIDE, 6).eval()
    clips = torch.randn(2, 6, 3, SIDE, SIDE)
    x = model.embed(clips)[:, model.num_prefix_tokens :]  # without the CLS token that ours adds
    for layer in model.blocks:
        x = layer(x)
    expected = theirs(clips).last_hidden_state
    torch.testing.assert_close(model.norm(x), expected, rtol=0, atol=1e-5)


def test_positions_of_videomae_need_one_for_each_token(
    videomae: tuple[VideoMAEModel, dict[str, Tensor]], tmp_path: Path
) -> None:
    save_file(videomae[1], tmp_path / "videomae.safetensors")
    config = video_config(tmp_path / "videomae.safetensors")
    config.clip_positions = "slots"
    with pytest.raises(ConfigError, match=r"VideoMAE, .* set model.clip_positions=tokens"):
        VisionBackbone(config, SIDE, 6)
    image = VisionBackbone(config, SIDE, 1)  # has no later time slots
    torch.testing.assert_close(image.pos_embed[0], sinusoid_table(16, WIDTH))


@torch.no_grad()
def test_clip_positions_of_each_token_are_resized() -> None:
    def vit(side: int, frames: int, positions: Any) -> VisionBackbone:
        kwargs = {**SIZES, "patch_size": 8}
        return VisionBackbone(ModelConfig(kwargs=kwargs, clip_positions=positions), side, frames)

    torch.manual_seed(0)
    tokens, slots = vit(32, 6, "tokens"), vit(32, 6, "slots")
    assert tokens.pos_temporal.shape == (1, 2, 16, WIDTH)
    # one for each slot is the same for every place
    load_adapted(tokens, slots.state_dict(), "slots")
    clip = torch.randn(2, 6, 3, 32, 32)
    assert torch.equal(tokens.embed(clip), slots.embed(clip))
    back = vit(32, 6, "slots")
    load_adapted(back, tokens.state_dict(), "tokens")
    torch.testing.assert_close(back.pos_temporal, slots.pos_temporal, rtol=0, atol=1e-6)
    # another size and length, on loading as in the forward pass
    torch.nn.init.normal_(tokens.pos_temporal)
    large = vit(64, 12, "tokens")
    load_adapted(large, tokens.state_dict(), "tokens")
    clip = torch.randn(1, 12, 3, 64, 64)
    torch.testing.assert_close(tokens.embed(clip), large.embed(clip), rtol=0, atol=1e-5)
    assert large.pos_temporal.shape == (1, 5, 64, WIDTH)


def test_a_torch_file_with_more_than_tensors_is_refused_in_one_line(tmp_path: Path) -> None:
    good = {"model": {"a": torch.ones(2)}, "epoch": 3}
    torch.save(good, tmp_path / "good.pth")
    assert read_weights(tmp_path / "good.pth", "f").keys() == {"a"}
    torch.save({**good, "args": argparse.Namespace(lr=1)}, tmp_path / "bad.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    for name, words in (("bad.pth", "convert it to a .safetensors"), ("list.pt", "no weights")):
        with pytest.raises(ArtifactError, match=words) as error:
            read_weights(tmp_path / name, "model.pretrained=file")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
