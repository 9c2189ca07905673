"""A few training steps of every variant of every stage, against the same steps on the CPU."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tools.common.fresh_process import in_fresh_process
from tools.gpu.findings import Check, Finding, Number, Scale
from tools.gpu.stage_steps import BLOCKS, StageSteps, tiny_llm, toy_settings

FP32, BF16, CUT = 2e-4, 5e-2, 1e-4  # largest relative differences of a loss
LIVE = {"text": {"features": "live"}}
# name -> (stage, settings); all tokens are kept where no variant is about their reduction, because
# rounding decides which of two nearly equal tokens is dropped
KEEP: dict[str, Any] = {"model": {"keep_rate": 0.7}}
VARIANTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mae, images and clips": ("mae", [{"data": {"blocks": BLOCKS}}]),
    "hashtag, softmax": ("hashtag", []),
    "hashtag, sampled softmax": ("hashtag", [{"hashtag": {"sampled": 16}}]),
    "hashtag, chunks": ("hashtag", [{"hashtag": {"chunk": 32, "smoothing": 0.1}}]),
    "hashtag, asymmetric": ("hashtag", [{"hashtag": {"loss": "asymmetric", "chunk": 32}}]),
    "hashtag, truncated": ("hashtag", [{"hashtag": {"truncate": 0.2}}]),
    "hashtag, CutMix": ("hashtag", [{"hashtag": {"cutmix": 1.0}}]),
    "hashtag, EViT": ("hashtag", [KEEP]),
    "hashtag, ToMe": ("hashtag", [KEEP, {"model": {"reduce": "tome"}}]),
    "hashtag, random tokens": ("hashtag", [KEEP, {"model": {"reduce": "random"}}]),
    "text, LoRA": ("text", [{"text": {"tune": "lora"}}]),
    "text, negatives": ("text", [{"text": {"negatives": "wrong", "pooling": "last"}}]),
    "clip, stored text": ("clip", []),
    "clip, live text": ("clip", [LIVE, {"text": {"tune": "lora", "lora_rank": 4}}]),
    "clip, sigmoid": ("clip", [{"clip": {"loss": "sigmoid"}}]),
    "clip, two captions": ("clip", [{"clip": {"captions": 2}}]),
    "clip, prefixes": ("clip", [{"clip": {"matryoshka": [8, 16]}}]),
    "clip, patch dropout": ("clip", [{"clip": {"mask_ratio": 0.5, "mask_until": 1.0}}]),
    "clip, auxiliary losses": ("clip", [{"clip": {"mae_weight": 1.0, "hashtag_weight": 1.0}}]),
    "clip, frames": (
        "clip",
        [
            {"data": {"blocks": BLOCKS}},
            {"model": {"video": "frames", "frame_pool": "attention"}},
        ],
    ),
    "clip, checkpointing": ("clip", [{"model": {"grad_checkpointing": True}}]),
    "clip, gradient cache": ("clip", [{"train": {"micro_batch": 2}}]),
}


class CpuDraws(TorchDispatchMode):
    """Draws all random numbers on the CPU, so that they are equal on all devices."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        draws = torch.Tag.nondeterministic_seeded in function.tags
        if not draws or "attention" in function._schema.name:  # attention without dropout
            return function(*args, **kwargs)
        tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        default = tensors[0].device if tensors else torch.device("cpu")
        device = torch.device(kwargs.get("device") or default)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        on_cpu = tree_map_only(Tensor, Tensor.cpu, args)
        result = function(*on_cpu, **kwargs)
        if function._schema.is_mutable:
            return args[0].copy_(on_cpu[0])
        return tree_map_only(Tensor, lambda value: value.to(device), result)


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Train each variant in fp32 and bf16, and compare the losses with the CPU's in fp32."""
    torch.backends.cudnn.allow_tf32 = False
    steps = 2 if scale.toy else 3
    with ThreadPoolExecutor(1) as pool:
        expected = None
        if device.type == "cuda":
            torch.zeros(1, device=device)  # starts CUDA before it is hidden from the other process
            expected = pool.submit(_in_cpu_process, steps)
        found: dict[str, dict[str, Any]] = {}
        for name in VARIANTS:
            found[name] = {kind: losses_of(name, device, kind, steps) for kind in ("fp32", "bf16")}
        reference = None if expected is None else expected.result()
    for name, losses in found.items():
        yield Number(f"{name}, losses", losses["fp32"])
        # On the CPU itself, the fp32 losses are the reference, and must be finite.
        cpu = losses["fp32"] if reference is None else reference[name]
        yield _close(f"{name}, fp32", losses["fp32"], cpu, FP32)
        yield _close(f"{name}, bf16", losses["bf16"], cpu, BF16)
    cut, whole = found["clip, gradient cache"]["fp32"], found["clip, stored text"]["fp32"]
    yield _close("clip, gradient cache as the whole block", cut, whole, CUT)


def _in_cpu_process(steps: int) -> Mapping[str, Any]:
    """Compute the losses on the CPU in another process, because this one uses CUDA."""
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}):
        return in_fresh_process(cpu_losses, steps)


def cpu_losses(steps: int) -> dict[str, Any]:
    """Return the losses of each variant on the CPU in fp32."""
    from xray.dist import choose_device
    from xray.training.deepspeed_setup import init_distributed

    device = choose_device("cpu")
    init_distributed(device)
    return {name: losses_of(name, device, "fp32", steps) for name in VARIANTS}


def losses_of(name: str, device: torch.device, precision: str, steps: int) -> list[float] | str:
    """Return the losses of a variant's steps, or the error that one raised."""
    stage, settings = VARIANTS[name]
    given = toy_settings(stage, *settings, {"train": {"precision": precision}})
    try:
        with TemporaryDirectory() as folder:
            reads = stage == "text" or LIVE in settings
            made = StageSteps(stage, given, device, tiny_llm(Path(folder)) if reads else None)
        with nullcontext() if device.type == "cpu" else CpuDraws():
            losses = [made.step(number) for number in range(steps)]
        made.engine.destroy()
        return losses
    except Exception as error:  # a variant that fails must not hide the others
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _close(name: str, losses: Any, expected: Any, limit: float) -> Check:
    """Compare losses by their largest relative difference; an error is a failed check."""
    want = f"<= {limit:g}"
    for values in (losses, expected):
        if isinstance(values, str):
            return Check(name, False, values, want)
    pairs = zip(losses, expected, strict=True)
    difference = max(abs(a - b) / max(1e-6, abs(b)) for a, b in pairs)
    return Check(name, difference <= limit, float(f"{difference:.1e}"), want)
