"""Logged metrics of a run: rates, means, and their sinks."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_comparison import MEASURED
from tiny import settings, train
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from stages import stage_class
from stages.base import Parents
from stages.tuning import set_trained
from xray.errors import ConfigError
from xray.models.flops import linear_macs
from xray.training import throughput
from xray.training.gpu_specs import gpu_of
from xray.training.metrics import read_metrics
from xray.training.step_result import Events, ReducedStep
from xray.training.throughput import Throughput, _forwards_of

CPU = torch.device("cpu")
DEEP = "model.kwargs={patch_size: 8, embed_dim: 96, depth: 12, num_heads: 2}"


def built(stage: str, demo: Path, out: Path, *overrides: str) -> tuple[Any, Any]:
    """A stage that has read its data, and its module."""
    from data_pipelines.ingest.user_data import open_sources

    config = settings(stage, demo, out, *overrides)
    made = stage_class(stage)(config)
    made.prepare(open_sources(config.data, list(config.data.sources)), Parents())
    module = made.build(Parents())
    set_trained(module, config.optim)
    return made, module


def test_every_logged_line_has_the_throughput(demo: Path, tmp_path: Path) -> None:
    more = ("train.log_every=2", "train.tensorboard=false")
    train("hashtag", demo, tmp_path / "run", *more)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert {*MEASURED, "data/wait", "grad_norm", "keep_rate"} - row.keys() == {"mfu"}
        assert 0 <= row["data/wait"] <= 1 and 0.05 < row["memory/gb"] < 50
        # 8 of 12 samples are images of 16 tokens, 4 are clips of 32
        assert row["tokens/s"] / row["samples/s"] == pytest.approx((8 * 16 + 4 * 32) / 12)
    train_seconds = rows[-1]["seconds"]
    assert sum(24 / row["samples/s"] for row in rows) < 1.1 * train_seconds
    assert not (tmp_path / "run" / "tb").exists()


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("mae", ()),
        ("mae", ("model.video=frames",)),
        ("hashtag", ("data.resolution=[[0.0,16],[0.6,32]]",)),
        ("clip", ("clip.mask_ratio=0.4", "clip.mask_span=[0.0,0.5]")),
    ],
)
def test_counted_tokens_enter_the_backbone(
    demo: Path, tmp_path: Path, stage: str, more: tuple[str, ...]
) -> None:
    made, module = built(stage, demo, tmp_path, *more)
    module.train()
    seen: list[int] = []
    prefix = module.vision.num_prefix_tokens
    module.vision.blocks[0].register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape[0] * (given[0].shape[1] - prefix))
    )
    for progress in (0.1, 0.4, 0.9):
        side = made.config.data.resolution
        side = side if isinstance(side, int) else (16 if progress < 0.6 else 32)
        for frames in (1, 4):
            seen.clear()
            pixels = torch.zeros(2, frames, 3, side, side, dtype=torch.uint8)
            if stage == "mae":
                grid = module.vision.geometry.grid(frames, side, side)
                noise = torch.rand(2, grid[1] * grid[2])
                module.features({"pixels": pixels, "mask_noise": noise}, progress)
            else:
                visible = module._visible(pixels, progress) if stage == "clip" else None
                module.encode(pixels.float(), progress, visible)
            assert seen == [2 * made.visible(frames, progress)], (progress, frames)


def flops_of(made: Any, module: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """FLOPs of a step: as torch counts them in forward and backward, as Throughput does."""
    from data_pipelines.stream.loaded import Loaded

    module.train()
    meter = Throughput(made, module, CPU)
    meter.peak = 1e12
    with FlopCounterMode(display=False) as counter:
        module(batch, 0.9).loss.backward()
    meter.begin()
    meter.end(0.9, [Loaded(batch), Loaded({})])  # another one without captions
    assert meter.rates()["mfu"] == pytest.approx(meter.flops / meter.seconds / 1e12)
    return counter.get_total_flops(), meter.flops


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("mae", ()),
        ("clip", ("optim.vision.tune=lora",)),
        ("clip", (DEEP, "optim.vision.tune=last:6", "model.keep_rate=1.0")),
        ("clip", ()),  # the LLM is not trained
        ("clip", ("optim.vision.freeze=1.0", "text.tune=full")),
        ("clip", ("text.tune=lora", "text.lora_rank=4")),
        ("text", ("text.tune=full",)),
    ],
)
def test_model_flops_equal_those_of_a_step(
    demo: Path, tmp_path: Path, stage: str, more: tuple[str, ...]
) -> None:
    blocks = "data.blocks=[{source: photos, samples: 8}]"
    # wide, so that norms and heads, which are not counted, are a small part
    wide = "model.kwargs={patch_size: 8, embed_dim: 96, depth: 4, num_heads: 2}"
    plain = ("clip.adapter_blocks=0",) if stage == "clip" else ()
    made, module = built(stage, demo, tmp_path, blocks, wide, *plain, *more)
    batch = {"pixels": torch.zeros(8, 1, 3, 32, 32, dtype=torch.uint8)}
    if stage == "mae":
        batch["mask_noise"] = torch.rand(8, 16)
    else:
        captions = 1 if stage == "clip" else 2
        ids = torch.arange(3, 27).expand(8, captions, 24)
        batch |= {name: torch.ones_like(ids) for name in ("attention_mask", "pooled_mask")}
        batch["input_ids"] = ids
    counted, ours = flops_of(made, module, batch)
    # attention of the text tower is not counted: a tenth in a model this small
    assert ours == pytest.approx(counted, rel=0.12 if stage == "text" else 0.05)


def test_the_linear_layers_of_gpt2_count() -> None:
    tower = torch.nn.ModuleList([Conv1D(6, 4), torch.nn.Linear(4, 2)])
    tower[1].requires_grad_(False)
    assert (linear_macs(tower), linear_macs(tower, trained=True)) == (32, 24)
    assert _forwards_of(torch.nn.LayerNorm(4)) == 2  # without linear layers


def test_rates_leave_out_time_between_steps(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, module = built("mae", demo, tmp_path)
    clock = iter([0.0, 2.0, 100.0, 104.0])  # steps of 2 and 4 seconds, validation between them
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    meter = Throughput(made, module, CPU)
    for waited in (1.0, 0.5):
        meter.begin()
        meter.end(0.5, [])
        meter.waited += waited
    assert meter.rates()["samples/s"] == pytest.approx(2 * 12 / 6)
    assert meter.rates()["data/wait"] == pytest.approx(1.5 / 6)
    meter.restart()
    assert meter.samples == meter.seconds == meter.waited == 0


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)
def test_peak_flops_are_found_by_device_name(
    name: str, bf16: float | None, fp32: float | None
) -> None:
    gpu = gpu_of(name)
    peaks = (None, None) if gpu is None else (gpu.peak("bf16"), gpu.peak("fp32"))
    assert peaks == (bf16, fp32)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_library_is_named_before_training(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"train.{name} needs .*pip install .*{name}"):
        train("mae", demo, tmp_path / "run", "train.wandb=xray")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_same_name_is_not_the_library(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()  # as its runs leave behind
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="pip install"):
        train("mae", demo, tmp_path / "run", "train.wandb=xray")


def test_a_resumed_run_continues_its_wandb_run(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        pytest.skip("needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    train("mae", demo, out, "train.wandb=shapes")
    name = (out / "wandb_id").read_text()
    shutil.rmtree(out / "artifact")
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    train("mae", demo, out, "train.wandb=shapes")
    assert (out / "wandb_id").read_text() == name
    runs = sorted(path.name for path in (out / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.endswith(name) for run in runs)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_changed_line_is_named_when_a_run_continues(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    train("mae", demo, out)
    metrics, last = out / "metrics.jsonl", out / "checkpoints" / "step_00000006"
    for change, warns in ((0, 0), (1, 1)):
        shutil.rmtree(out / "artifact")
        shutil.rmtree(last)
        content = bytearray(metrics.read_bytes())
        content[content.index(b'"loss": ') + 12] ^= change  # a digit of the first loss
        metrics.write_bytes(content)
        caplog.clear()
        train("mae", demo, out)
        lines = [line for line in caplog.messages if "metrics.jsonl is damaged" in line]
        assert len(lines) == warns
    assert [row["step"] for row in read_metrics(metrics)] == [1, 2, 3, 4, 5, 6]


def test_a_norm_on_the_host_joins_the_metrics_of_the_device() -> None:
    """DeepSpeed computes it there with `zero.offload`."""
    device = torch.device("meta")
    result = ReducedStep(Events(), {"loss": torch.ones((), device=device)}, device)
    result.append("grad_norm", torch.ones(()))
    assert result["grad_norm"].device == result["loss"].device == device
