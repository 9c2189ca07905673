"""Inference: the precision of a frozen model, and results that reach the CPU without a wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from xray.config import Precision

T = TypeVar("T")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which a model of fp32 weights computes in a precision.

    fp32 changes nothing, so that a frozen model inside a training step keeps that step's precision.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def recorded(precision: Precision) -> dict[str, str]:
    """Return a precision as facts of what is stored; fp32 is left out, as in older files."""
    return {} if precision == "fp32" else {"precision": precision}


def one_behind(batches: Iterable[tuple[T, Mapping[str, Tensor]]]) -> Iterator[tuple[T, Any]]:
    """Yield (what, tensors by name) of each batch with the tensors on the CPU, one batch late.

    While the host reads a batch, the GPU works on the next one.
    """
    held: deque[tuple[T, dict[str, Tensor], Any]] = deque()
    for what, tensors in batches:
        copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        ready = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            ready = torch.cuda.Event()
            ready.record()
        held.append((what, copies, ready))
        if len(held) > 1:
            yield _read(held.popleft())
    yield from map(_read, held)


def _read(batch: tuple[T, dict[str, Tensor], Any]) -> tuple[T, dict[str, Tensor]]:
    what, copies, ready = batch
    if ready is not None:
        ready.synchronize()
    return what, copies
