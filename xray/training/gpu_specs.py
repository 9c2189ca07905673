"""Memory and peak throughput of GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from xray.errors import ConfigError, nearest


@dataclass(frozen=True)
class Gpu:
    """Memory of a device in GB, and its dense TFLOP/s (without sparsity) in bf16 and fp32.

    The fp32 value is that of the CUDA cores: torch leaves tf32 off in matrix products, and
    `dist.choose_device` switches it off in cuDNN.
    """

    memory: float
    bf16: float
    fp32: float

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s in a precision (`bf16` or `fp32`)."""
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
    """Find a device by the name it reports, as "NVIDIA H100 80GB HBM3"; None if unknown."""
    words = set(re.split(r"[\s-]+", name.lower()))
    matching = [key for key in GPUS if words.issuperset(key.split("-"))]
    return GPUS[max(matching, key=len)] if matching else None


def check_gpu(name: str) -> None:
    """Raise ConfigError for a --gpu that is neither in GPUS nor "none"."""
    if name != "none" and name not in GPUS:
        raise ConfigError(
            f"--gpu {name} is not known: {', '.join(GPUS)} or none (with --gb){nearest(name, GPUS)}"
        )
