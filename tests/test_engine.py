"""DeepSpeed behind the facade against a plain torch loop, and what stops a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import train
from torch import Tensor, nn

from stages.base import StepOutput
from stages.mae import MaeModule
from xray.config import RunConfig
from xray.engine import Engine, deepspeed_config, init_distributed
from xray.errors import ConfigError, TrainingError

LR = 0.05


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(6, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 100 * self.out(self.hidden(x).tanh()).float().square().mean()


def run_config(zero: int, precision: str, clip: float) -> RunConfig:
    config = RunConfig()
    config.zero.stage, config.train.precision = zero, precision  # type: ignore[assignment]
    config.optim.clip_grad = clip
    return config


def steps() -> list[list[Tensor]]:
    """Four steps of 2, 1, 3 and 2 micro-batches: a schedule may change their number."""
    batches = list(torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1)))
    return [batches[:2], batches[2:3], batches[3:6], batches[6:]]


def plain(precision: str, clip: float) -> tuple[dict[str, Tensor], list[float]]:
    """AdamW steps by accumulated gradients."""
    module, norms = Tiny(), []
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    for step in steps():
        optimizer.zero_grad()
        for x in step:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = module(x)
            (loss / len(step)).backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf"))
        norms.append(float(norm))
        optimizer.step()
    return module.state_dict(), norms


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("precision", "clip"), [("fp32", 0.0), ("fp32", 0.5), ("bf16", 0.5)])
def test_steps_equal_a_plain_loop(zero: int, precision: str, clip: float) -> None:
    init_distributed(torch.device("cpu"))
    engine = Engine(Tiny(), run_config(zero, precision, clip))  # type: ignore[arg-type]
    expected, norms = plain(precision, clip)
    found = []
    for step in steps():
        engine.set_lr(LR, 1.0)
        for number, x in enumerate(step):
            engine.begin(number, len(step))
            engine.backward(engine(x))
            engine.step()
        found.append(engine.grad_norm)
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    assert found == pytest.approx(norms, rel=10 * tolerance)
    for name, value in engine.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, expected[name], atol=tolerance), name
    engine.destroy()


def test_clipping_is_always_written_out() -> None:
    assert deepspeed_config(run_config(1, "fp32", 0.0))["gradient_clipping"] == 0.0
    config = run_config(0, "fp32", 0.0)
    config.zero.offload = True
    with pytest.raises(ConfigError, match=r"zero.offload=true needs zero.stage of 1 to 3"):
        deepspeed_config(config)


@pytest.mark.parametrize("zero", [0, 1])
def test_nonfinite_loss_stops_before_the_step(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int
) -> None:
    honest, calls, steps = MaeModule.loss_from_features, [], []

    def poisoned(self: MaeModule, features: dict[str, Tensor]) -> StepOutput:
        calls.append(1)
        loss, metrics = honest(self, features)
        return StepOutput(loss * float("nan") if len(calls) == 8 else loss, metrics)

    monkeypatch.setattr(MaeModule, "loss_from_features", poisoned)
    real_step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (steps.append(1), real_step(self)))
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="the loss of step 4 is nan"):
        train("mae", demo, out, f"zero.stage={zero}")
    assert len(steps) == 7  # 2 micro-batches x 3 steps, and the first of the fourth
    bundle = json.loads((out / "bundles" / "step_00000003" / "bundle.json").read_text())
    assert len(bundle["samples"]["photos"]) == 8
    assert (out / "checkpoints" / "step_00000003" / "COMPLETE").is_file()
    assert not (out / "artifact").exists()
