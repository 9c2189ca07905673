"""CUDA tensors without a GPU: shapes and devices are checked, and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.common.host_reads import HostReads

VALUES = {torch.bool: True, torch.int64: 0}  # of fake CPU tensors; those of floats are 0.5


class FakeHostReads(HostReads):
    """Counter of host reads of fake CUDA tensors.

    It simulates pinned memory, and values of CPU tensors such as random draws, which fake tensors
    do not have.
    """

    def __init__(self) -> None:
        super().__init__("cuda")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Any = None,
    ) -> Any:
        if func is torch.ops.aten._pin_memory.default:
            pinned = torch.empty_like(args[0])
            pinned.pinned = True  # type: ignore[attr-defined]
            return pinned
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "cpu":
            return VALUES.get(args[0].dtype, 0.5)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def fake_cuda() -> Iterator[FakeHostReads]:
    """Make `device="cuda"` give fake tensors, under bf16 autocast; yields the host reads so far.

    A mix of devices raises, and so does a host read, after it was counted.
    """
    with (
        patch("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", bool),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        FakeTensorMode(allow_non_fake_inputs=True),
        FakeHostReads() as reads,
        torch.autocast("cuda", torch.bfloat16),
    ):
        assert torch.is_autocast_enabled("cuda")
        yield reads


def problems(work: Callable[[], object]) -> list[str]:
    """Run work on fake CUDA tensors, and describe its host reads and the error it ends with."""
    error = ""
    with fake_cuda() as reads:
        try:
            work()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    found = [f"{read.operation} in {read.place}, line {read.line}" for read in reads.found]
    return found + [error] * bool(error)


def to_fake(tensor: Tensor) -> Tensor:
    """Make a fake CUDA tensor like a real one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def to_fake_module(module: nn.Module) -> None:
    """Replace all parameters and buffers by fake CUDA tensors; other attributes stay."""
    for owner in module.modules():
        for name, value in owner._parameters.items():
            if value is not None:
                owner._parameters[name] = nn.Parameter(to_fake(value), value.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = to_fake(buffer)
