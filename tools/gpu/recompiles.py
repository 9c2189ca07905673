"""Graphs that torch.compile makes of the blocks, and its limit on recompilations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from tools.gpu.findings import Check, Finding, Number, Scale
from tools.gpu.stage_steps import BLOCKS, PROGRESS, StageSteps, toy_settings

MOST = 8  # graphs of a model in all the situations below
DEPTH = 12


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Count the graphs of a model with drop path on images and clips, at several keep rates."""
    config: Any = torch._dynamo.config
    yield Number("limit on recompilations", config.recompile_limit)
    with config.patch(fail_on_recompile_limit_hit=True):
        for stage in ("mae", "clip"):
            yield from _stage(stage, device, 4 if scale.toy else DEPTH)


def _stage(stage: str, device: torch.device, depth: int) -> Iterator[Finding]:
    """Count the graphs of a stage. Only tracing matters here, so no code is generated."""
    torch._dynamo.reset()
    graphs = Counter[str]()
    now = ["training"]

    def count(graph: Any, _: Any) -> Any:
        graphs[now[0]] += 1
        return graph.forward

    compile_: Callable[..., Any] = torch.compile

    def counting(*args: Any, **kwargs: Any) -> Any:
        return compile_(*args, **{**kwargs, "backend": count, "mode": None})

    settings = toy_settings(
        stage,
        {"model": {"drop_path": 0.1, "kwargs": {"depth": depth}}},
        {"data": {"blocks": BLOCKS}, "train": {"precision": "bf16", "compile": True}},
    )
    failure = ""
    with patch.object(torch, "compile", counting):
        steps = StageSteps(stage, settings, device)
        try:
            for now[0], call in _situations(steps).items():
                call()
        except Exception as error:
            failure = f"{now[0]}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    steps.engine.destroy()
    for situation, number in graphs.items():
        yield Number(f"{stage}, graphs in {situation}", number)
    yield Check(f"{stage}, limit on recompilations", not failure, failure, "not reached")
    total = sum(graphs.values())
    yield Check(f"{stage}, graphs", 0 < total <= MOST, total, f"1 to {MOST}")


def _situations(steps: StageSteps) -> dict[str, Callable[[], Any]]:
    """Return passes that differ in what the compiler may specialise on, by name."""

    def train(rate: float = 1.0, progress: float = PROGRESS) -> None:
        steps.config.model.keep_rate = rate
        steps.step(0, progress)

    def without_gradients() -> None:
        with torch.no_grad():
            for item in steps.loaded:
                batch = {key: value.to(steps.device) for key, value in item.batch.items()}
                steps.engine(batch, PROGRESS, "features")

    def evaluate() -> None:
        steps.accumulator.evaluate(PROGRESS, steps.shape.micro, steps.loaded)

    return {
        "training": train,
        "a pass without gradients": without_gradients,
        "training at keep rate .8": lambda: train(0.8),
        "training at keep rate .7": lambda: train(0.7),
        "training at keep rate .5": lambda: train(0.5),
        "evaluation": evaluate,
    }
