"""Versions, devices, and the ceilings of the hardware: matrix products, copies, collectives."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from functools import partial

import torch

from tools.common.timing import hardware, interleaved
from tools.gpu.findings import Check, Finding, Number, Scale
from xray.doctor import checks
from xray.training.gpu_specs import gpu_of

PACKAGES = ("torch", "torchvision", "timm", "transformers", "deepspeed", "decord2", "av")
SHARE = 0.6  # of the data sheet's bf16 throughput that a large matrix product reaches


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Report the environment and measure what the hardware can reach."""
    yield Number("hardware", hardware(device.type))
    yield Number("python", platform.python_version())
    for name in PACKAGES:
        try:
            yield Number(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Number(name, "not installed")
    yield Number("CUDA", torch.version.cuda)
    yield Number("cuDNN", torch.backends.cudnn.version())
    yield Number("tf32 of matrix products", torch.backends.cuda.matmul.allow_tf32)
    yield Number("tf32 of convolutions", torch.backends.cudnn.allow_tf32)
    if device.type == "cuda":
        yield Number("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    yield from _doctor()
    yield from _group(device)
    yield from _ceilings(device, scale)


def _doctor() -> Iterator[Finding]:
    """Run the checks of `xray doctor` that take no network and start no processes."""
    for name in ("processor", "devices", "shared_memory", "compiler"):
        check = getattr(checks, name)
        call = partial(check, checks.Path("/dev/shm")) if name == "shared_memory" else check
        for found in checks.guarded(name, call):
            if found.state == "broken":
                yield Check(f"doctor, {found.what}", False, found.found, found.lacks)
            else:
                yield Number(f"doctor, {found.what}", found.found)


def _group(device: torch.device) -> Iterator[Finding]:
    """Check DeepSpeed's device and a collective over a group of one process."""
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    yield Check("DeepSpeed's device", name == device.type, name, device.type)
    value = torch.full((1000,), 3.0, device=device)
    torch.distributed.all_reduce(value)
    backend = torch.distributed.get_backend()
    want = "nccl" if device.type == "cuda" else "gloo"
    ok = backend == want and bool((value == 3).all())
    yield Check("sum over one process", ok, f"{backend}, {value[0].item()}", f"{want}, 3.0")


def _ceilings(device: torch.device, scale: Scale) -> Iterator[Finding]:
    size = 256 if scale.toy else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    seconds = min(interleaved({"mm": partial(torch.mm, a, b)}, 2 if scale.toy else 10)["mm"])
    rate = 2 * size**3 / seconds / 1e12
    gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None or scale.toy:
        yield Number("bf16 matrix product, TFLOP/s", rate)
    else:
        want = SHARE * gpu.bf16
        name = f"bf16 matrix product of {size}, TFLOP/s"
        yield Check(name, rate >= want, round(rate, 1), f">= {want:.0f}")
    megabytes = 1 if scale.toy else 1024
    on_device = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    host = torch.empty(megabytes << 20, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copies = {
        "copy on the device, GB/s read and written": (on_device.clone(), 2),
        "copy from pinned memory, GB/s": (host, 1),
    }
    for name, (source, passes) in copies.items():
        call = partial(on_device.copy_, source, non_blocking=True)
        seconds = min(interleaved({"copy": call}, 3)["copy"])
        yield Number(name, passes * on_device.nbytes / seconds / 1e9)
