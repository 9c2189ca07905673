"""Gradient norm, clipping and the guard of DeepSpeed's optimizer step, all on the device.

DeepSpeed's host reads the norm of each parameter group to find gradients that are not finite, and
waits for the device each time. Here the norm stays on the device: a fused optimizer itself leaves
out an update if its `found_inf` is set. Norm and clipping are those of DeepSpeed, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xray import dist


class GuardedStep:
    """Steps of a DeepSpeed engine that update nothing for a norm or loss of NaN or inf.

    A fused optimizer decides this on the device; for another one, the host reads the device in each
    step. engine: DeepSpeed's, in a ZeRO stage, without offload. optimizer: the torch optimizer that
    makes the update. trained: parameters with gradients, read in stage 0. sharded: the same, but
    of these a rank has only its rows.
    """

    def __init__(
        self,
        engine: Any,
        stage: int,
        optimizer: Any,
        trained: Sequence[Tensor],
        sharded: Sequence[Tensor] = (),
    ) -> None:
        self.engine, self.stage, self.optimizer = engine, stage, optimizer
        self.trained, self.sharded = trained, sharded
        self.fused = bool(optimizer.defaults.get("fused"))
        self.clip_norm = float(engine.gradient_clipping())
        self._skips = False  # the step is left out by the host
        self._scale: Tensor | None = None  # factor of the gradients in the present step
        if stage == 0:
            engine.clip_fp32_gradients = lambda: None  # `step` has done so
            return
        engine.optimizer.unscale_and_clip_grads = self._clip_partition
        if stage == 3:
            engine.optimizer._get_norm_groups = lambda: [torch.tensor(self._norm_for_deepspeed())]
        else:
            engine.optimizer.scaled_global_norm = self._norm_for_deepspeed

    @torch.no_grad()
    def step(self, loss: Tensor | None) -> Tensor:
        """Update the parameters unless the norm or the loss is not finite; returns the norm.

        loss: 0-d, on the device of the gradients, equal on all ranks.
        """
        if self.stage == 0:
            gradients = [p.grad for p in self.trained if p.grad is not None]
            equal = len(gradients)  # on all ranks
            gradients += [p.grad for p in self.sharded if p.grad is not None]
            norms = torch.stack(torch._foreach_norm(gradients))
            if self.sharded:
                squares = dist.sum_over_ranks(norms[equal:].double().square())
                norms = torch.cat([norms[:equal], squares.sqrt().to(norms.dtype)])
            norm, total = torch.linalg.vector_norm(norms), norms.pow(2).sum().pow(0.5)
        else:
            norm = total = self._norm_over_ranks()
        finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        if self.fused:
            self.optimizer.found_inf = (~finite).float()
        elif not dist.to_host(finite):
            self.skip()
            return norm
        self._scale = None
        if self.clip_norm:
            self._scale = self._clip_scale(total)
            if self.stage == 0:
                torch._foreach_mul_(gradients, self._scale)
        self.engine.step()
        return norm

    def skip(self) -> None:
        """End a step without an update of parameters or moments."""
        if self.stage == 0:
            self.engine.zero_grad()
            return
        self._skips = True  # ZeRO leaves out a step with a norm of inf
        self.engine.step()
        self._skips = False

    def _norm_for_deepspeed(self) -> float:
        """Return a norm on the host, by which DeepSpeed decides to make the step or not."""
        return float("inf") if self._skips else 1.0

    def _clip_partition(self, partition: Any, _: Any) -> None:
        """Clip the gradients of a group, or of the number of a sub-group in stage 3."""
        if self._scale is None:
            return
        if self.stage == 3:
            partition = [self.engine.optimizer.fp32_partitioned_groups_flat[partition].grad]
        torch._foreach_mul_(partition, self._scale)

    def _clip_scale(self, norm: Tensor) -> Tensor:
        """Return the factor that brings gradients of this norm to `clip_norm` at most."""
        if self.stage == 0:
            return (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        return 1.0 / ((norm + 1e-6) / self.clip_norm).clamp(min=1.0)

    def _norm_over_ranks(self) -> Tensor:
        """Return the norm of the gradients that all ranks hold together."""
        groups = self.engine.optimizer.averaged_gradients
        squares = torch.stack([self._square(groups[number]) for number in sorted(groups)])
        norms = dist.sum_over_ranks(squares).pow(0.5)
        norm = torch.linalg.vector_norm(norms)
        return torch.where(norm.isfinite(), norm, torch.inf)

    def _square(self, gradients: Sequence[Tensor]) -> Tensor:
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
        if not norms:  # a rank without a part of this group
            norms = [torch.zeros((), dtype=torch.float64, device=self.trained[0].device)]
        square = torch.stack(norms).pow(2).sum()
        return square if self.stage == 3 else square.float()
