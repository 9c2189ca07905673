"""Gradients that two processes reduce during and after the backward pass.

usage: torchrun --nproc_per_node 2 overlap_ranks.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from xray import dist
from xray.config import RunConfig, ZeroConfig
from xray.training.deepspeed_setup import init_distributed
from xray.training.engine import Engine

STEPS, MICROS = 3, 2
COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_single")


class Layers(nn.Module):
    """Eight layers, one of which some micro-batches do not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.unused = False

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if not (self.unused and number == 3):
                x = x + layer(x).tanh()
        return x.square().mean()


class BackwardCounter:
    """Counts collectives while `Engine.backward` runs autograd, and after it."""

    def __init__(self) -> None:
        self.during = 0
        self.running = False
        for name in COLLECTIVES:
            if hasattr(torch.distributed, name):
                setattr(torch.distributed, name, self._count(getattr(torch.distributed, name)))
        backward = torch.autograd.backward

        def marked(*args: Any, **kwargs: Any) -> None:
            self.running = True
            try:
                backward(*args, **kwargs)
            finally:
                self.running = False

        torch.autograd.backward = marked

    def _count(self, collective: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.during += self.running
            return collective(*args, **kwargs)

        return counted


def run(zero: int, overlap: bool, counter: BackwardCounter) -> dict[str, Tensor]:
    """Return the weights after some steps; counts the reductions in the backward passes."""
    config = RunConfig()
    config.zero = ZeroConfig(zero, overlap=overlap)  # type: ignore[arg-type]
    module = Layers()
    engine = Engine(module, config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(dist.rank())
    counter.during = 0
    for step in range(STEPS):
        engine.set_lr(0.05, 1.0)
        for number in range(MICROS):
            # in all micro-batches of the second step, and in the last one of the third
            module.unused = step == 1 or (step == 2 and number + 1 == MICROS)
            engine.begin(number, MICROS)
            engine.backward(engine(torch.randn(4, 16, generator=generator)))
            engine.step()
    weights = engine.state_dict()
    engine.destroy()
    return weights


def main() -> None:
    init_distributed(torch.device("cpu"))
    counter = BackwardCounter()
    for zero in (0, 1, 2):
        plain = run(zero, False, counter)
        before = counter.during
        overlapped = run(zero, True, counter)
        assert all(torch.equal(value, plain[name]) for name, value in overlapped.items()), zero
        if dist.is_main():
            print(f"zero {zero}: {before} reductions during backward, {counter.during} overlapped")
        # DeepSpeed's ZeRO 1 would not average what the last micro-batch does not use
        assert counter.during >= before + 4 * STEPS * (zero != 1), (zero, before, counter.during)
    dist.leave()


if __name__ == "__main__":
    main()
