"""Captions per second of a language model of Qwen3-0.6B's shape with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tools.common.timing import interleaved
from tools.gpu.findings import Check, Finding, Number, Scale
from tools.gpu.stage_steps import StageSteps, toy_settings
from xray.config import TextConfig
from xray.models.text_tower import TextTower

QWEN = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 512,
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512}
LONGEST = 77  # tokens
MEDIAN, SPREAD = 16, 0.6  # of the log-normal lengths of captions from the web
BUCKETS = 8
FASTER = 4.0  # speed of bf16 over fp32
EQUAL = 2e-2  # largest distance of a sentence vector between bf16 and fp32, over its length


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Time the frozen tower in fp32, bf16 and by length, and a step of LoRA."""
    number = 16 if scale.toy else 256
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(number, generator=generator).mul(SPREAD).exp().mul(MEDIAN)
    lengths = lengths.round().long().clamp(3, LONGEST).tolist()
    lengths[0] = LONGEST
    with TemporaryDirectory() as folder:
        shape = QWEN | (SMALL if scale.toy else {})
        (Path(folder) / "config.json").write_text(json.dumps(shape), "utf-8")
        yield from _frozen(Path(folder), lengths, shape["vocab_size"], device, scale)
        yield from _lora(Path(folder), device, scale)


def _frozen(
    folder: Path, lengths: Sequence[int], vocabulary: int, device: torch.device, scale: Scale
) -> Iterator[Finding]:
    """Time forward passes of the frozen tower over the same captions."""
    torch.manual_seed(0)
    config = TextConfig(tune="none", lora_rank=0, pooling="mean", max_length=LONGEST)
    with torch.device(device):
        tower = TextTower(config, folder, weights=False).eval()
    padded = [_batch(lengths, vocabulary, device)]
    in_order = sorted(lengths)
    size = math.ceil(len(lengths) / BUCKETS)
    parts = [in_order[start : start + size] for start in range(0, len(lengths), size)]
    by_length = [_batch(part, vocabulary, device) for part in parts]

    def passes(batches: Sequence[Tensor], autocast: bool) -> Callable[[], Tensor]:
        @torch.no_grad()
        def call() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                return torch.cat([tower(*batch)[:, 0].float() for batch in batches])

        return call

    speeds = {}
    vectors = {}
    for name, batches, autocast, dtype in (
        ("fp32", padded, False, torch.float32),
        ("fp32 weights, bf16 autocast", padded, True, torch.float32),
        ("bf16 weights", padded, False, torch.bfloat16),
        ("bf16 weights, sorted by length", by_length, False, torch.bfloat16),
    ):
        tower.to(dtype)
        call = passes(batches, autocast)
        vectors[name] = call()
        speeds[name] = len(lengths) / min(
            interleaved({"pass": call}, 1 if scale.toy else 3)["pass"]
        )
        yield Number(f"frozen, {name}, captions/s", round(speeds[name], 1))
    distance = (vectors["bf16 weights"] - vectors["fp32"]).norm() / vectors["fp32"].norm()
    yield Check(
        "distance of bf16 vectors", distance.item() <= EQUAL, distance.item(), f"<= {EQUAL}"
    )
    ratio = speeds["bf16 weights"] / speeds["fp32"]
    if scale.toy:
        yield Number("speed of bf16 over fp32", ratio)
    else:
        yield Check("speed of bf16 over fp32", ratio >= FASTER, round(ratio, 2), f">= {FASTER}")


def _batch(lengths: Sequence[int], vocabulary: int, device: torch.device) -> Any:
    """Make random captions of these lengths, padded to the longest: ids and two masks."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(2, vocabulary, (len(lengths), 1, longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None, None]).long()
    return ids.to(device), mask.to(device), mask.to(device)


def _lora(folder: Path, device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Time a step of the text stage with LoRA, in bf16, on pairs of captions of full length."""
    samples = 4 if scale.toy else 64
    more: dict[str, Any] = {
        "data": {"blocks": [{"source": "images", "samples": samples}]},
        "text": {"tune": "lora", "max_length": 16 if scale.toy else LONGEST, "dtype": "bf16"},
        "train": {"precision": "bf16"},
    }
    steps = StageSteps("text", toy_settings("text", more), device, folder, build_on=device)
    losses: list[float] = []
    times = interleaved({"step": lambda: losses.append(steps.step())}, 1 if scale.toy else 4)
    steps.engine.destroy()
    yield Number("LoRA, captions/s", round(2 * samples / min(times["step"]), 1))
    finite = all(loss == loss for loss in losses)
    yield Check("LoRA, losses are finite", finite, losses[-1], "finite")
