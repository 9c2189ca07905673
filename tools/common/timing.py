"""Timing of alternatives that take turns, so that other load on the machine affects all alike."""

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
    """Run all alternatives in turn and return the seconds of each per round.

    One round of warm-up is not counted. clock: source of time in seconds.
    """
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
    """Wait for the work of the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speedup(seconds: Mapping[str, list[float]], of: str, over: str) -> float:
    """Return the speed of `of` divided by that of `over`, each in its best round.

    Other load on the machine only adds time, so the best round is the most reliable one.
    """
    return min(seconds[over]) / min(seconds[of])


def hardware(device: str) -> str:
    """Return the name of the device, and the version of torch, for the head of a benchmark."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}"
