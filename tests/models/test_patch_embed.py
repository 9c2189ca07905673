"""Tests of patches and of the stem, against torch's convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from xray.config import ModelConfig
from xray.models import VisionBackbone
from xray.models.patch_embed import TubeletConv, patchify, unpatchify


def test_patchify_equals_manual_slicing_and_is_invertible() -> None:
    clip = torch.rand(2, 4, 3, 16, 24)
    patches = patchify(clip, (8, 8), 2)
    assert patches.shape == (2, 2 * 2 * 3, 2 * 8 * 8 * 3)
    expected = clip[1, 2:4, :, 8:16, 16:24].permute(0, 2, 3, 1).reshape(-1)
    assert torch.equal(patches[1, 6 + 3 + 2], expected)
    assert torch.equal(unpatchify(patches, (2, 2, 3), (8, 8)), clip)


def test_patchify_cuts_the_patches_at_an_index() -> None:
    clip = torch.rand(2, 4, 3, 16, 24)
    index = torch.tensor([[11, 0, 7], [5, 6, 2]])
    patches = patchify(clip, (8, 8), 2)
    assert torch.equal(patchify(clip, (8, 8), 2, index)[1], patches[1, index[1]])
    assert torch.equal(patchify(clip, (8, 8), 2, index)[0], patches[0, index[0]])


def some_of(batch: int, patches: int) -> Tensor:
    return torch.rand(batch, patches).argsort(dim=1)[:, : patches // 3]


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (4, 32, 32), (6, 24, 48)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_stem_equals_the_convolution(
    frames: int, height: int, width: int, dtype: torch.dtype, close: float
) -> None:
    torch.manual_seed(0)
    stem = TubeletConv(3, 40, (2, 8, 8), (2, 8, 8)).to(dtype)
    pixels = torch.randn(2, frames, 3, height, width, dtype=dtype)
    clip = pixels.expand(-1, max(frames, 2), -1, -1, -1)  # an image is a clip of equal frames
    reference = F.conv3d(clip.transpose(1, 2), stem.weight, stem.bias, stem.stride)
    every = reference.flatten(2).transpose(1, 2)
    n = every.shape[1]
    index = some_of(2, n)
    chosen = every.gather(1, index[..., None].expand(-1, -1, 40))
    whole = torch.arange(n).expand(2, -1)  # through the matrix product that CUDA uses
    upstream = torch.randn_like(every)
    for own, expected in (
        (stem(pixels), every),
        (stem(pixels, whole), every),
        (stem(pixels, index), chosen),
    ):
        assert torch.allclose(own, expected, atol=close)
        grads = [
            torch.autograd.grad(
                (out * upstream[:, : out.shape[1]]).sum(), (stem.weight, stem.bias), None, True
            )
            for out in (own, expected)
        ]
        for one, other in zip(*grads, strict=True):
            assert torch.allclose(one, other, rtol=close, atol=100 * close)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("side", [4, 6])
def test_visible_patches_equal_those_taken_from_all(name: str, frames: int, side: int) -> None:
    """Positions are interpolated where the side, in patches, is not the table's 4."""
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 16
    model = VisionBackbone(ModelConfig(name=name, kwargs={"depth": 1}), 4 * patch, 4).double()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    size, P = side * patch, model.num_prefix_tokens
    pixels = torch.randn(2, frames, 3, size, size, dtype=torch.float64)
    every = model.embed(pixels)
    index = some_of(2, every.shape[1] - P)
    kept = every[:, P:].gather(1, index[..., None].expand(-1, -1, model.embed_dim))
    expected = torch.cat([every[:, :P], kept], dim=1)
    grads = []
    for out in (model.embed(pixels, index), expected):
        assert torch.allclose(out, expected, atol=1e-12)
        model.zero_grad()
        out.square().sum().backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() >= {"pos_embed", "cls_token"}
    for key, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][key], atol=1e-9), key


class Called(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frames", [1, 4])
def test_no_convolution_runs_on_cuda(frames: int) -> None:
    """On fake tensors, which need no GPU."""
    with FakeTensorMode(), torch.no_grad():
        for device, convolves in (("cuda", False), ("cpu", True)):
            stem = TubeletConv(3, 40, (2, 8, 8), (2, 8, 8), device=device)
            pixels = torch.empty(2, frames, 3, 32, 32, device=device)
            with Called() as called:
                assert stem(pixels).shape == (2, max(1, frames // 2) * 16, 40)
            assert any("convolution" in name for name in called.names) == convolves
