"""Stem of the backbone on images and clips against convolutions and a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.common.timing import interleaved
from tools.gpu.findings import Check, Finding, Number, Scale
from xray.config import ModelConfig
from xray.models import VisionBackbone

SLOWER = 3.0  # limit of the stem's time over that of the matrix product alone
NAMES = {"images": "vit_base_patch16_224", "toy": "vit_tiny_patch16_224"}


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Time forward and backward of the stem in bf16 on images and on clips."""
    name, side = ("toy", 32) if scale.toy else ("images", 224)
    config = ModelConfig(name=NAMES[name])
    for kind, batch, frames in (("images", 256, 1), ("clips", 16, 16)):
        torch.manual_seed(0)
        backbone = VisionBackbone(config, 224, 16).to(device)
        stem, tubelet = backbone.patch_embed, 1 if frames == 1 else backbone.tubelet
        pixels = torch.randn(2 if scale.toy else batch, frames, 3, side, side, device=device)
        calls = {
            "stem": partial(stem, pixels),
            "convolution": _convolution(stem.proj.weight, pixels, tubelet),
            "matrix product": _product(stem.proj, pixels, tubelet),
        }
        runs = {what: _both_passes(call, stem, device) for what, call in calls.items()}
        seconds = interleaved(runs, 1 if scale.toy else 5)
        best = {what: min(times) for what, times in seconds.items()}
        for what, time in best.items():
            yield Number(f"{kind}, {what}, ms", 1e3 * time)
        ratio = best["stem"] / best["matrix product"]
        title = f"{kind}, time of the stem over that of the matrix product"
        if scale.toy:
            yield Number(title, ratio)
        else:
            yield Check(title, ratio <= SLOWER, round(ratio, 2), f"<= {SLOWER}")
        with torch.no_grad():
            close = torch.allclose(calls["stem"](), calls["matrix product"](), atol=1e-2)
        yield Check(f"{kind}, stem equals the matrix product", close, close, "equal to 1e-2")


def _both_passes(
    call: Callable[[], Tensor], module: nn.Module, device: torch.device
) -> Callable[[], None]:
    def both() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            out = call()
        out.float().square().mean().backward()
        module.zero_grad(set_to_none=True)

    return both


def _convolution(weight: Tensor, pixels: Tensor, tubelet: int) -> Callable[[], Tensor]:
    """Return the stem as a convolution of which the kernel equals the stride."""

    def call() -> Tensor:
        if tubelet == 1:
            return F.conv2d(pixels[:, 0], weight.sum(2), stride=weight.shape[-2:])
        return F.conv3d(pixels.transpose(1, 2), weight, stride=weight.shape[2:])

    return call


def _product(proj: nn.Module, pixels: Tensor, tubelet: int) -> Callable[[], Tensor]:
    """Return the stem as a matrix product with patches as rows."""
    weight: Tensor = proj.weight
    size, patch = len(pixels), weight.shape[-1]
    grid = pixels.shape[1] // tubelet, pixels.shape[3] // patch, pixels.shape[4] // patch

    def call() -> Tensor:
        kernel = weight.sum(2, keepdim=True) if tubelet == 1 else weight
        cut = pixels.unflatten(1, (grid[0], tubelet)).unflatten(4, (grid[1], patch))
        cut = cut.unflatten(6, (grid[2], patch))  # [B, t, k, 3, h, p, w, p]
        rows = cut.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(size, grid[0] * grid[1] * grid[2], -1)
        return F.linear(rows, kernel.flatten(1), proj.bias)

    return call
