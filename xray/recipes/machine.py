"""Machine that a recipe is written for: its devices, and the speed that training reaches there."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from xray.errors import ConfigError
from xray.training.gpu_specs import GPUS, gpu_of
from xray.words import count

GPU_SHARE = 0.3  # of a GPU's peak that training reaches; assumed, as `xray plan --mfu`
# Share of the speed of a matrix product that training a small model reaches on a CPU, with data
# loading; about that of the quickstart on 2 cores.
CPU_SHARE = 0.25
SIDE, SECONDS = 768, 0.3  # of the measured matrix products


@dataclass(frozen=True)
class Machine:
    """Devices to train on. speed: FLOP/s that training reaches on all of them, an estimate."""

    cores: int
    gpus: int
    gpu: str  # a name of GPUS, "" on a CPU
    speed: float

    @property
    def devices(self) -> int:
        """Number of training processes."""
        return max(1, self.gpus)

    def __str__(self) -> str:
        if self.gpus:
            return f"{self.gpus:,} x {self.gpu}; assumed to reach {GPU_SHARE:.0%} of the peak"
        cores = count(self.cores, "CPU core")
        return f"{cores}, no GPU; training reaches about {self.speed / 1e9:.0f} GFLOP/s here"


def find_machine(gpus: int | None, gpu: str) -> Machine:
    """Describe this machine, or the GPUs that are named; raises ConfigError for unknown ones.

    gpus: their number; None = those of this machine. gpu: their name; "" = that of this machine.
    """
    cores = len(os.sched_getaffinity(0))
    number = torch.cuda.device_count() if gpus is None else gpus
    if gpu and gpus is None:
        number = max(1, number)
    if not number:
        return Machine(cores, 0, "", CPU_SHARE * matmul_speed())
    if not gpu and torch.cuda.is_available():
        reported = torch.cuda.get_device_name(0)
        known = gpu_of(reported)
        gpu = next((name for name, own in GPUS.items() if own is known), "")
    if gpu not in GPUS:
        wrong = f"--gpu {gpu} is not known" if gpu else "the kind of GPU is not known: set --gpu"
        raise ConfigError(f"{wrong}; there are {', '.join(GPUS)}")
    return Machine(cores, number, gpu, number * GPU_SHARE * GPUS[gpu].peak("bf16"))


def matmul_speed() -> float:
    """Measure the FLOP/s of fp32 matrix products on this CPU, for SECONDS."""
    matrix = torch.rand(SIDE, SIDE)
    matrix @ matrix  # starts the threads
    products, begun = 0, time.perf_counter()
    while (taken := time.perf_counter() - begun) < SECONDS:
        matrix @ matrix
        products += 1
    return 2 * SIDE**3 * products / taken
