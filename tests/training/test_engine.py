"""The engine against a plain torch loop, and steps that stop a run.

Errors that DeepSpeed does not report, and the tests that the engine avoids them:
clipping at 1 by default          test_steps_equal_a_plain_loop, test_clipping_is_always_set
misspelled keys                   test_keys_of_deepspeed_are_checked
one step too many in bf16         test_steps_equal_a_plain_loop, bf16 at ZeRO 0
gradients rounded in bf16         the same at ZeRO 1, test_bf16_keeps_small_updates
frozen parameters lost            test_frozen_and_unused_parameters_are_equal_in_every_stage
decay without a gradient          the same: applied as in DeepSpeed, in every stage
gradients lost or added again     test_a_micro_batch_may_leave_out_parameters, offload at ZeRO 2
NaN in a step                     test_gradients_that_are_not_finite_change_nothing
weights or groups mixed up in     test_portable_state.py: its checkpoints are not used
  checkpoints, `latest` too early   (test_resume.py kills runs that are saving)
masters that a clamp misses       test_stages.py, test_logit_scale_master_obeys_the_clamp
partitioned parameters used       test_zero_stage_matrix.py trains ZeRO 3 with all partitioned
  outside of forward
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from tiny import train
from torch import Tensor, nn

from stages.base import StepOutput
from stages.mae import MaeModule
from xray.config import RunConfig, ZeroConfig
from xray.config.training import OPEN
from xray.errors import ConfigError, TrainingError
from xray.training.deepspeed_setup import deepspeed_config, init_distributed
from xray.training.engine import Engine

LR = 0.05


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(6, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 100 * self.out(self.hidden(x).tanh()).float().square().mean()


# Thresholds that make ZeRO partition even these small parameters, in several pieces.
CUT = {"stage3_param_persistence_threshold": 0, "sub_group_size": 20, "reduce_bucket_size": 30}
ZERO = {
    **{str(stage): ZeroConfig(stage) for stage in (0, 1, 2, 3)},  # type: ignore[arg-type]
    **{f"{stage}, offload": ZeroConfig(stage, True) for stage in (1, 2, 3)},  # type: ignore[arg-type]
    **{
        f"{stage}, cut": ZeroConfig(stage, deepspeed={"zero_optimization": CUT})  # type: ignore[arg-type]
        for stage in (1, 2, 3)
    },
    "3, cut, offload": ZeroConfig(3, True, {"zero_optimization": CUT}),
}


def run_config(zero: int | ZeroConfig, precision: str = "fp32", clip: float = 0.0) -> RunConfig:
    config = RunConfig()
    config.zero = ZeroConfig(zero) if isinstance(zero, int) else zero  # type: ignore[arg-type]
    config.train.precision, config.optim.clip_grad = precision, clip  # type: ignore[assignment]
    return config


def take(engine: Engine, step: list[Tensor], lr: float = LR) -> float:
    """Make a step of micro-batches and return the gradient norm."""
    engine.set_lr(lr, 1.0)
    for number, x in enumerate(step):
        engine.begin(number, len(step))
        engine.backward(engine(x))
        engine.step()
    return engine.grad_norm


def steps() -> list[list[Tensor]]:
    """Four steps of 2, 1, 3 and 2 micro-batches: a schedule may change their number."""
    batches = list(torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1)))
    return [batches[:2], batches[2:3], batches[3:6], batches[6:]]


def plain(precision: str, clip: float) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and gradient norms of a plain AdamW loop with gradient accumulation."""
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


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize(("precision", "clip"), [("fp32", 0.0), ("fp32", 0.5), ("bf16", 0.5)])
def test_steps_equal_a_plain_loop(zero: str, precision: str, clip: float) -> None:
    init_distributed(torch.device("cpu"))
    engine = Engine(Tiny(), run_config(ZERO[zero], precision, clip))  # type: ignore[arg-type]
    expected, norms = plain(precision, clip)
    assert [take(engine, step) for step in steps()] == pytest.approx(norms, rel=1e-4)
    for name, value in engine.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, expected[name], atol=1e-5), name
    engine.destroy()


@pytest.mark.parametrize("zero", ZERO)
def test_the_state_is_read_and_written_by_parameter(zero: str) -> None:
    """A second engine continues from the state of the first, bit for bit in equal ZeRO settings."""
    init_distributed(torch.device("cpu"))
    engines = [Engine(Tiny(), run_config(ZERO[zero])) for _ in range(2)]  # type: ignore[arg-type]
    first, second = engines
    for step in steps()[:2]:
        take(first, step)
    for name in first.trained:
        for slot in (None, "exp_avg", "exp_avg_sq"):
            second.write(name, first.read(name, slot), slot)
            assert torch.equal(first.read(name, slot), second.read(name, slot))
    second.set_steps(first.steps)
    for step in steps()[2:]:
        assert take(first, step) == take(second, step)
    one, two = (engine.state_dict() for engine in engines)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    for engine in engines:
        engine.destroy()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_keeps_small_updates(zero: int) -> None:
    """Weights of 1 with updates of 1e-4, which bf16 weights would round away (next: 1.0078)."""
    init_distributed(torch.device("cpu"))
    module = Tiny()
    nn.init.ones_(module.out.weight)
    config = run_config(zero, "bf16")
    config.optim.weight_decay = 0.0
    engine = Engine(module, config)  # type: ignore[arg-type]
    (batch, *_), *_ = steps()
    for _ in range(10):
        take(engine, [batch], lr=1e-4)
    moved = 1 - engine.state_dict()["out.weight"]
    assert torch.allclose(moved.abs(), torch.full((1, 8), 1e-3), rtol=0.2), moved
    assert torch.equal(1 - engine.read("out.weight"), moved)
    engine.destroy()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_frozen_and_unused_parameters_are_equal_in_every_stage(zero: int) -> None:
    init_distributed(torch.device("cpu"))
    module = Tiny()
    module.frozen, module.unused = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    engine = Engine(module, run_config(zero))  # type: ignore[arg-type]
    for step in steps():
        take(engine, step)
    after = engine.state_dict()
    assert after.keys() == before.keys()
    assert torch.equal(after["frozen.weight"], before["frozen.weight"])
    decayed = before["unused.weight"] * (1 - LR * RunConfig().optim.weight_decay) ** 4
    assert torch.allclose(after["unused.weight"], decayed)
    assert torch.equal(after["unused.bias"], before["unused.bias"])
    engine.destroy()


class Either(nn.Module):
    """Two layers, of which a micro-batch or a whole step may use one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)])

    def forward(self, x: Tensor, used: Sequence[int]) -> Tensor:
        return 100 * sum(self.layers[number](x).square().mean() for number in used)


@pytest.mark.parametrize("zero", ZERO)
def test_a_micro_batch_may_leave_out_parameters(zero: str) -> None:
    """Their gradients come from the step's other micro-batches, first or last, or are zero."""
    init_distributed(torch.device("cpu"))
    config = run_config(ZERO[zero])
    config.optim.weight_decay = 0.0
    module = Either()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    engine = Engine(Either(), config)  # type: ignore[arg-type]
    engine.set_lr(LR, 1.0)
    uses = [["0", "1"], ["01"], ["1", "0", "0"], ["1", "1"], ["0"]]
    for step, used in zip([*steps(), steps()[1]], uses, strict=True):
        optimizer.zero_grad(set_to_none=False)
        for number, (x, names) in enumerate(zip(step, used, strict=True)):
            layers = [int(name) for name in names]
            (module(x, layers) / len(step)).backward()
            engine.begin(number, len(step))
            engine.prepare_pass("forward and backward", names)
            engine.backward(engine(x, layers))
            engine.step()
        norm = nn.utils.clip_grad_norm_(module.parameters(), float("inf"))
        assert engine.grad_norm == pytest.approx(float(norm), rel=1e-4)
        optimizer.step()
    for name, value in engine.state_dict().items():
        assert torch.allclose(value, module.state_dict()[name], atol=1e-5), name
    engine.destroy()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_that_are_not_finite_change_nothing(zero: int) -> None:
    init_distributed(torch.device("cpu"))
    engine = Engine(Tiny(), run_config(zero))  # type: ignore[arg-type]
    first, second, third, _ = steps()
    take(engine, first)
    before = engine.state_dict()
    assert not math.isfinite(take(engine, [float("inf") * x for x in second]))
    after = engine.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert math.isfinite(take(engine, third))
    engine.destroy()


def test_clipping_is_always_set() -> None:
    assert deepspeed_config(run_config(1))["gradient_clipping"] == 0.0
    with pytest.raises(ConfigError, match=r"zero.offload=true needs zero.stage of 1 to 3"):
        deepspeed_config(run_config(ZeroConfig(0, offload=True)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_cliping": 0.1}, r"unknown key 'gradient_cliping': it may set comms_logger, "),
        ({"prescale_gradient": True}, r"unknown key .*did you mean 'prescale_gradients'\?"),
        ({"gradient_clipping": 0.1}, r"may not set gradient_clipping: set optim.clip_grad"),
        ({"bf16": {"enabled": True}}, r"may not set bf16: set train.precision"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization.stage: set zero.stage"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            r"may not set zero_optimization.offload_param: set zero.offload",
        ),
        ({"zero_optimization": {"overlap_com": True}}, r"zero_optimization.overlap_com \(extra"),
        (
            {"zero_optimization": {"overlap_comm": True}},
            r"overlap_comm=true with zero.stage=1 does",
        ),
        ({"zero_optimization": 3}, r"zero.deepspeed.zero_optimization=3 must be a dict"),
    ],
)
def test_keys_of_deepspeed_are_checked(given: dict[str, Any], message: str) -> None:
    """DeepSpeed ignores an unknown key, and clips at 1 by default."""
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(run_config(ZeroConfig(1, deepspeed=given)))


def test_keys_of_deepspeed_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The logger of collectives is global, and waits for the device.
    monkeypatch.setattr(deepspeed.comm.comm.comms_logger, "enabled", False)
    given: dict[str, Any] = {
        "zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": False},
        "torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "flops_profiler": {"enabled": True, "output_file": str(tmp_path / "flops")},
        "comms_logger": {"enabled": True},
        "timers": {"throughput": {"enabled": True}},
    }
    assert sorted(given) == sorted(OPEN)
    init_distributed(torch.device("cpu"))
    engine = Engine(Tiny(), run_config(ZeroConfig(1, deepspeed=given), "bf16"))  # type: ignore[arg-type]
    keys = engine._engine.config
    assert keys["zero_optimization"] == {"stage": 1} | given.pop("zero_optimization")
    autocast = {"enabled": True, "dtype": "bfloat16"}
    assert keys["torch_autocast"] == autocast | given.pop("torch_autocast")
    assert all(keys[key] == value for key, value in given.items())
    for step in steps():
        take(engine, step)
    assert (tmp_path / "flops").is_file()
    engine.destroy()


@pytest.mark.parametrize("zero", [0, 3])
def test_nonfinite_loss_stops_before_the_step(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int
) -> None:
    honest, calls = MaeModule.loss_from_features, []

    def poisoned(self: MaeModule, features: dict[str, Tensor]) -> StepOutput:
        calls.append(1)
        loss, metrics = honest(self, features)
        return StepOutput(loss * float("nan") if len(calls) == 8 else loss, metrics)

    monkeypatch.setattr(MaeModule, "loss_from_features", poisoned)
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="the loss of step 4 is nan"):
        train("mae", demo, out, f"zero.stage={zero}")
    saved, bundled = (
        {file.name: file.read_bytes() for file in sorted((out / folder / "portable").iterdir())}
        for folder in ("checkpoints/step_00000003", "bundles/step_00000003")
    )
    assert saved == bundled and saved
    bundle = json.loads((out / "bundles" / "step_00000003" / "bundle.json").read_text())
    assert len(bundle["samples"]["photos"]) == 8
    assert (out / "checkpoints" / "step_00000003" / "COMPLETE").is_file()
    assert not (out / "artifact").exists()
