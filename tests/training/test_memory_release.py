"""Release of a stage's memory before the next one begins."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import train
from torch import nn

from xray.config import RunConfig, ZeroConfig
from xray.training.deepspeed_setup import init_distributed
from xray.training.engine import Engine


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_nothing_of_a_stage_is_alive_after_it(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int
) -> None:
    alive: dict[str, weakref.ref[Any]] = {}
    create = Engine.__init__

    def record(self: Engine, module: nn.Module, config: Any) -> None:
        create(self, module, config)  # type: ignore[arg-type]
        alive["module"], alive["engine"] = weakref.ref(module), weakref.ref(self)
        alive["DeepSpeed's engine"] = weakref.ref(self._engine)
        alive["a weight"] = weakref.ref(next(iter(self._trained.values())))

    monkeypatch.setattr(Engine, "__init__", record)
    linear = torch.nn.functional.linear
    train("mae", demo, tmp_path, f"zero.stage={zero}", "train.ema=0.9")
    assert torch.nn.functional.linear is linear  # which ZeRO 3 replaces
    assert [name for name, reference in alive.items() if reference() is not None] == []


def test_the_linear_function_is_torchs_after_engines_that_overlap() -> None:
    """The second engine is made while the first one's ZeRO 3 has replaced the function."""
    init_distributed(torch.device("cpu"))
    linear = torch.nn.functional.linear
    config = RunConfig()
    config.zero = ZeroConfig(3)
    engines = [Engine(nn.Linear(4, 4), config) for _ in range(2)]  # type: ignore[arg-type]
    assert torch.nn.functional.linear is not linear
    for engine in engines:
        engine.destroy()
    assert torch.nn.functional.linear is linear
