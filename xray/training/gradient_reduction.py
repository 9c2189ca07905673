"""Gradients of a step: reduction over ranks during the backward pass, for ZeRO 0 (`zero.overlap`),
and removal of those that ZeRO keeps from the step before."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from xray import dist


class GradientReducer:
    """Averages gradients over ranks in buckets, each as soon as its gradients are complete.

    The buckets are fixed and reduced in one order, so that all ranks agree: the last parameters
    first, because the backward pass reaches them first. dtype: of the values on the wire.
    """

    def __init__(self, parameters: Sequence[Tensor], bucket: int, dtype: torch.dtype) -> None:
        self.buckets: list[list[Tensor]] = [[]]
        self.dtype = dtype
        size = 0
        for parameter in reversed(parameters):
            if size >= bucket:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += parameter.numel()
        for number, members in enumerate(self.buckets):
            for parameter in members:
                parameter.register_post_accumulate_grad_hook(
                    functools.partial(self._complete, number)
                )
        self._missing: list[int] = []  # incomplete gradients of each bucket; [] between steps
        self._running: list[tuple[Tensor, torch.distributed.Work]] = []

    def begin(self) -> None:
        """Reduce the gradients of the coming backward pass, the last one of a step."""
        self._missing = [len(members) for members in self.buckets]

    def finish(self) -> None:
        """Reduce what the backward pass left out, and wait for all buckets."""
        while len(self._running) < len(self.buckets):
            self._reduce()
        for members, (flat, work) in zip(self.buckets, self._running, strict=True):
            work.wait()
            mean = flat / dist.world_size()
            gradients = [_gradient(parameter) for parameter in members]
            parts = mean.split([gradient.numel() for gradient in gradients])
            views = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
            torch._foreach_copy_(gradients, views)
        self._missing, self._running = [], []

    def _complete(self, number: int, _: Tensor) -> None:
        if not self._missing:
            return
        self._missing[number] -= 1
        while len(self._running) < len(self.buckets) and not self._missing[len(self._running)]:
            self._reduce()

    @torch.no_grad()
    def _reduce(self) -> None:
        """Start the reduction of the next bucket."""
        members = self.buckets[len(self._running)]
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in members]).to(self.dtype)
        work = torch.distributed.all_reduce(flat, async_op=True)
        assert work is not None
        self._running.append((flat, work))


def clear_gradients(optimizer: Any, stage: int) -> None:
    """Clear the gradients of the last step that DeepSpeed's optimizer keeps.

    These are sums over micro-batches (ZeRO 2 and 3) and, if offloaded, the gradients of the fp32
    masters. DeepSpeed overwrites a sum in the first micro-batch only, and would add it again where
    a later one reaches its parameter first. It would update a parameter that no micro-batch
    reaches by its last gradient.
    """
    if stage == 3:
        optimizer.grad_partitions_flat_buffer.zero_()
        masters = optimizer.fp32_partitioned_groups_flat if optimizer.offload_optimizer else []
    elif stage and optimizer.cpu_offload:
        for gradient in optimizer.accumulated_grads_in_cpu.values():
            gradient.zero_()
        masters = optimizer.single_partition_of_fp32_groups
    else:
        return
    for master in masters:
        master.grad.zero_()


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:  # unused in this step, perhaps on this rank only
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
