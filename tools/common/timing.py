"""Timing of alternatives that take turns, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every run in every round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speedup(seconds: Mapping[str, list[float]], of: str, over: str) -> float:
    """How many times faster `of` is than `over`, each at its best: other work only adds time."""
    return min(seconds[over]) / min(seconds[of])


def hardware(device: str) -> str:
    """What the figures were measured on."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}"
