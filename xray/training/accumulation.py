"""Forward and backward of a step's micro-batches through the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipelines.stream.loaded import Loaded
from data_pipelines.stream.sampling import MicroBatch
from stages.base import Stage, StepOutput
from xray import dist
from xray.training.device_batches import DeviceBatches
from xray.training.engine import Engine
from xray.training.gradient_cache import CachedLoss, cached_losses, schedule, surrogate_loss


@dataclass(frozen=True)
class Accumulator:
    """Runs a stage's micro-batches and returns losses and metrics as means over each block."""

    engine: Engine
    stage: Stage
    device: torch.device
    seed: int

    def train(
        self, step: int, progress: float, micros: Sequence[MicroBatch], loaded: Sequence[Loaded]
    ) -> dict[str, Tensor]:
        """Accumulate the gradients of all micro-batches; the update (`engine.step`) is left out.

        Returns losses and metrics [0-d, on the device], which the host has not read.
        """
        self.engine.train()
        means = BlockMeans(micros)
        batches = self._batches(micros, loaded, repeated=True)
        for number, cached in self._passes(step, progress, micros, batches):
            micro = micros[number]
            self._reseed(step, number)
            self.engine.begin(number, len(micros))
            # Only one part of a split block has gradients of the loss's parameters.
            reached = sorted(cached.gradients) if cached is not None else []
            self.engine.prepare_pass("forward and backward", micro.source, *reached)
            if cached is None:
                output = self.engine(batches.take(number), progress)
                loss = output.loss
            else:
                batch = batches.take(number) | cached.constants
                features = self.engine(batch, progress, "features")
                output = cached.output
                # The block's loss is computed once: it is not a mean over its micro-batches.
                loss = means.parts[micro.block] * surrogate_loss(features, cached.gradients)
            self.engine.backward(loss * micro.scale)
            if number + 1 < len(micros):
                self.engine.step()
            means.add(micro, output)
        return means.values

    @torch.no_grad()
    def evaluate(
        self, progress: float, micros: Sequence[MicroBatch], loaded: Sequence[Loaded]
    ) -> dict[str, Tensor]:
        """Return the losses and metrics of micro-batches, without randomness [0-d]."""
        self.engine.train(False)
        means = BlockMeans(micros)
        batches = self._batches(micros, loaded, repeated=False)
        for number, cached in self._passes(0, progress, micros, batches):
            self.engine.prepare_pass("forward", micros[number].source)
            output = cached.output if cached else self.engine(batches.take(number), progress)
            means.add(micros[number], output)
        return means.values

    def _passes(
        self, step: int, progress: float, micros: Sequence[MicroBatch], batches: DeviceBatches
    ) -> Iterator[tuple[int, CachedLoss | None]]:
        """Run the schedule, and yield before each backward pass, which the caller runs.

        Yields the number of the micro-batch, and the cached loss if its block is split.
        """
        rows: dict[int, dict[str, Tensor]] = {}
        cached: dict[int, CachedLoss] = {}
        for each in schedule(micros, self.stage.contrasts):
            number = each.numbers[0]
            if each.kind == "features":
                self._reseed(step, number)
                self.engine.prepare_pass("forward", micros[number].source)
                with torch.no_grad():
                    rows[number] = self.engine(batches.take(number), progress, "features")
            elif each.kind == "loss":
                module = self.engine.module
                block = [rows.pop(member) for member in each.numbers]
                losses = cached_losses(module.loss_from_features, block, module.training)
                cached |= zip(each.numbers, losses, strict=True)
            else:
                yield number, cached.get(number)

    def _batches(
        self, micros: Sequence[MicroBatch], loaded: Sequence[Loaded], repeated: bool
    ) -> DeviceBatches:
        """Return the batches of all forward passes; repeated: also those of the backward passes."""
        order: list[int] = []
        for each in schedule(micros, self.stage.contrasts):
            if each.kind == "features" or (
                each.kind == "backward" and (repeated or each.numbers[0] not in order)
            ):
                order += each.numbers
        return DeviceBatches(loaded, order, self.device)

    def _reseed(self, step: int, micro: int) -> None:
        """Draw the same random numbers in both passes over a micro-batch, and after a resume."""
        words = [self.seed, step, micro, dist.rank()]
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
        torch.manual_seed(seed)


class BlockMeans:
    """Means of losses and metrics over each block's micro-batches, and the step's total loss."""

    def __init__(self, micros: Sequence[MicroBatch]) -> None:
        self.micros = len(micros)
        self.parts = Counter(micro.block for micro in micros)
        self.values: dict[str, Tensor] = {}

    def add(self, micro: MicroBatch, output: StepOutput) -> None:
        """Add the loss and metrics of a micro-batch."""
        parts, loss = self.parts[micro.block], output.loss.detach()
        values = {f"{micro.source}/loss": loss / parts}
        values |= {f"{micro.source}/{k}": v.float() / parts for k, v in output.metrics.items()}
        values["loss"] = loss * micro.scale / self.micros
        for name, value in values.items():
            self.values[name] = self.values[name] + value if name in self.values else value
