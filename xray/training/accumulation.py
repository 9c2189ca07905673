"""A step's micro-batches through the engine.

plain    a forward and a backward of each; the loss is that of the micro-batch
cached   where a loss compares all samples of a block, and the block is cut (gradient cache,
         2101.06983): features of its micro-batches without gradient, their loss and its gradient
         with respect to them, then each micro-batch again, in the same random state, and backward
         from there
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipelines.stream.loader import Loaded
from data_pipelines.stream.sampling import MicroBatch
from stages.base import Batch, Stage, StepOutput
from xray import dist
from xray.training.engine import Engine

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Spanned:
    """The loss of a block that was cut, and its gradient in a micro-batch's features."""

    output: StepOutput
    slopes: Features


@dataclass(frozen=True)
class Accumulator:
    """Runs a stage's micro-batches; losses and metrics come back as means over each block."""

    engine: Engine
    stage: Stage
    device: torch.device
    seed: int

    def train(
        self, step: int, progress: float, cut: Sequence[MicroBatch], loaded: Sequence[Loaded]
    ) -> dict[str, float]:
        """Forward and backward of every micro-batch, all but the last counted by the engine."""
        self.engine.train()
        parts = Counter(micro.block for micro in cut)
        spanned = self._spanned(step, progress, cut, loaded)
        sums: dict[str, Tensor] = {}
        for number, (micro, item) in enumerate(zip(cut, loaded, strict=True)):
            self._reseed(step, number)
            self.engine.begin(number, len(cut))
            whole = spanned.get(number)
            if whole is None:
                output = self.engine(self._to_device(item.batch), progress)
                loss = output.loss
            else:
                features = self.engine(self._to_device(item.batch), progress, "features")
                output = whole.output
                # the block's loss is one, and not a mean over its micro-batches
                loss = parts[micro.block] * _along(features, whole.slopes)
            self.engine.backward(loss * micro.scale)
            if number + 1 < len(cut):
                self.engine.step()
            _add(sums, micro, parts[micro.block], len(cut), output)
        return _to_host(sums)

    @torch.no_grad()
    def evaluate(
        self, progress: float, cut: Sequence[MicroBatch], loaded: Sequence[Loaded]
    ) -> dict[str, float]:
        """The losses and metrics of micro-batches, without randomness."""
        self.engine.train(False)
        parts = Counter(micro.block for micro in cut)
        spanned = self._spanned(0, progress, cut, loaded)
        sums: dict[str, Tensor] = {}
        for number, (micro, item) in enumerate(zip(cut, loaded, strict=True)):
            whole = spanned.get(number)
            output = (
                self.engine(self._to_device(item.batch), progress)
                if whole is None
                else whole.output
            )
            _add(sums, micro, parts[micro.block], len(cut), output)
        return _to_host(sums)

    def _spanned(
        self, step: int, progress: float, cut: Sequence[MicroBatch], loaded: Sequence[Loaded]
    ) -> dict[int, Spanned]:
        """What the micro-batches of cut blocks are to go backward from, by number."""
        parts = Counter(micro.block for micro in cut)
        found: dict[int, Spanned] = {}
        for block in [b for b, count in parts.items() if self.stage.spans_batch and count > 1]:
            numbers = [number for number, micro in enumerate(cut) if micro.block == block]
            rows: list[Features] = []
            for number in numbers:
                self._reseed(step, number)
                with torch.no_grad():
                    batch = self._to_device(loaded[number].batch)
                    rows.append(self.engine(batch, progress, "features"))
            found |= dict(zip(numbers, self._contrast(rows), strict=True))
        return found

    def _contrast(self, rows: Sequence[Features]) -> list[Spanned]:
        """The loss of all rows of features, and what each of them is to go backward from.

        A 0-d feature is a parameter that the loss needs: it is the same in all, and its gradient
        goes to the first.
        """
        whole = {
            name: torch.cat([row[name] for row in rows]) if value.ndim else value
            for name, value in rows[0].items()
        }
        training = self.engine.module.training
        with torch.set_grad_enabled(training):
            leaves = {name: v.detach().requires_grad_(training) for name, v in whole.items()}
            output = self.engine.module.loss_from_features(leaves)
            if not training:
                return [Spanned(output, {}) for _ in rows]
            found = torch.autograd.grad(output.loss, [*leaves.values()], allow_unused=True)
            # a teacher's features need none
            grads = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
        output = StepOutput(output.loss.detach(), output.metrics)
        slopes: list[Features] = [{} for _ in rows]
        for name, grad in grads.items():
            pieces = grad.split([len(row[name]) for row in rows]) if grad.ndim else [grad]
            for slope, piece in zip(slopes, pieces, strict=False):
                slope[name] = piece
        return [Spanned(output, slope) for slope in slopes]

    def _to_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def _reseed(self, step: int, micro: int) -> None:
        words = [self.seed, step, micro, dist.rank()]
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
        torch.manual_seed(seed)


def _along(features: Features, slopes: Features) -> Tensor:
    """A loss whose gradient with respect to features is slopes."""
    return torch.stack([(features[name] * slope).sum() for name, slope in slopes.items()]).sum()


def _add(
    sums: dict[str, Tensor], micro: MicroBatch, parts: int, micros: int, output: StepOutput
) -> None:
    """Means over a block's micro-batches, and the blocks' weighted loss."""
    values = {f"{micro.source}/loss": output.loss.detach() / parts}
    values |= {f"{micro.source}/{k}": v.float() / parts for k, v in output.metrics.items()}
    values["loss"] = output.loss.detach() * micro.scale / micros
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def _to_host(sums: dict[str, Tensor]) -> dict[str, float]:
    """All scalars in one transfer."""
    names = list(sums)
    values = torch.stack([sums[name].reshape(()).float() for name in names]).tolist()
    return dict(zip(names, values, strict=True))
