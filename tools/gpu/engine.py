"""Cost of a step through the engine in ZeRO 0 to 3, against a plain loop of PyTorch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from tools.benchmarks.bench_engine import Steps
from tools.common.timing import interleaved
from tools.gpu.findings import Check, Finding, Number, Scale

MOST = 1.05  # time of ZeRO 0 over that of the plain loop
EQUAL = 1e-2  # largest difference of the first losses


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Time steps of the mae stage with ViT-S/16 at 112 px, which take turns on one batch."""
    steps = Steps(device, 1 if scale.toy else 64)
    stages = (0,) if scale.toy else (0, 1, 2, 3)
    engines = {f"ZeRO {stage}": steps.engine(stage) for stage in stages}
    runs = {"plain": steps.plain()}
    runs |= {name: steps.through(engine) for name, engine in engines.items()}
    losses = {name: float(step()) for name, step in runs.items()}
    spread = max(losses.values()) - min(losses.values())
    yield Check("difference of the first losses", spread <= EQUAL, spread, f"<= {EQUAL}")
    seconds = interleaved(runs, 1 if scale.toy else 12)
    for name, times in seconds.items():
        yield Number(f"{name}, ms per step", 1e3 * statistics.median(times))
        pairs = zip(times, seconds["plain"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        if name != "ZeRO 0" or scale.toy:
            yield Number(f"{name}, time over the plain loop's", round(ratio, 3))
        else:
            title = f"{name}, time over the plain loop's"
            yield Check(title, ratio <= MOST, round(ratio, 3), f"<= {MOST}")
    for engine in engines.values():
        engine.destroy()
