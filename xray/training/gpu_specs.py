"""What GPUs can do, by their vendor's data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A device: memory in GB, and dense TFLOP/s, without sparsity, in bf16 and fp32.

    fp32 is that of the CUDA cores, for tf32 is off in torch.
    """

    memory: float
    bf16: float
    fp32: float

    def peak(self, precision: str) -> float:
        """FLOP/s at most."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


GPUS = {
    "a100": Gpu(80, 312, 19.5),
    "a100-40gb": Gpu(40, 312, 19.5),
    "h100": Gpu(80, 989, 67),
    "h100-pcie": Gpu(80, 756, 51),
    "h100-nvl": Gpu(94, 835, 60),
    "h200": Gpu(141, 989, 67),
    "gh200": Gpu(96, 989, 67),
    "b200": Gpu(180, 2250, 75),
    "l4": Gpu(24, 121, 30.3),
    "l40s": Gpu(48, 362, 91.6),
    "rtx-4090": Gpu(24, 165, 82.6),
}


def gpu_of(name: str) -> Gpu | None:
    """The entry for a device's own name, as "NVIDIA H100 80GB HBM3"; None where there is none."""
    words = set(re.split(r"[\s-]+", name.lower()))
    matching = [key for key in GPUS if words.issuperset(key.split("-"))]
    return GPUS[max(matching, key=len)] if matching else None
