"""LoRA of the image tower: outputs, gradients and merged weights against plain linear layers."""

from __future__ import annotations

import torch
from torch import nn

from xray.config import ModelConfig
from xray.models import VisionBackbone
from xray.models.lora import LoraLinear, add_lora, is_lora, merged

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def tower(seed: int = 0) -> VisionBackbone:
    torch.manual_seed(seed)
    return VisionBackbone(ModelConfig(kwargs=dict(SIZES)), 32, 4).eval()


def changed(module: nn.Module) -> None:
    """Give all LoRA matrices values other than 0."""
    for name, parameter in module.named_parameters():
        if is_lora(name):
            nn.init.normal_(parameter, std=0.1)


def test_a_layer_equals_one_with_the_merged_weight() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5).double()
    layer = LoraLinear(base, rank=2, alpha=6)
    x, upstream = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    assert torch.equal(layer(x), base(x))  # the update starts as 0
    changed(layer)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    expected = x @ (base.weight + 3.0 * b @ a).t() + base.bias
    torch.testing.assert_close(layer(x), expected)
    (layer(x) * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(layer.lora_a.grad, a.grad)
    torch.testing.assert_close(layer.lora_b.grad, b.grad)


def test_a_tower_equals_a_plain_one_with_the_merged_state() -> None:
    vision, plain = tower(), tower(1)
    names = list(vision.state_dict())
    pixels = torch.randn(2, 4, 3, 32, 32)
    before = vision(pixels, 0.7).cls
    add_lora(vision, 4, 8)
    assert torch.equal(vision(pixels, 0.7).cls, before)
    changed(vision)
    state = merged(vision, vision.state_dict())
    assert list(state) == names and not any(is_lora(name) for name in names)
    plain.load_state_dict(state)
    for one, other in zip(plain(pixels, 0.7)[:2], vision(pixels, 0.7)[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert (plain(pixels, 0.7).cls - before).abs().max() > 0.01


def test_a_state_without_lora_stays_as_it_is() -> None:
    vision = tower()
    state = vision.state_dict()
    kept = merged(vision, state)
    assert list(kept) == list(state) and all(kept[name] is state[name] for name in state)
