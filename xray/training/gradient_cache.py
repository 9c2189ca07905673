"""Gradient cache (2101.06983): exact gradients of a loss over a block that is split.

A loss that compares all samples of a block needs the features of all its micro-batches at once.
The schedule first computes these features without a graph, then the loss and its gradient with
respect to the features, then runs each micro-batch again and backpropagates that gradient.
Features that need no gradient, of frozen towers, are not computed again.
Training executes the schedule with real tensors, planning with fake ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_pipelines.stream.sampling import MicroBatch
from stages.base import StepOutput


@dataclass(frozen=True)
class Pass:
    """One pass of a step."""

    # features: forward of a micro-batch without a graph. loss: loss of a split block, and its
    # gradient with respect to the cached features. backward: forward with a graph, then backward.
    kind: Literal["features", "loss", "backward"]
    block: int
    numbers: tuple[int, ...]  # indices of the micro-batches in the step


@dataclass(frozen=True)
class CachedLoss:
    """Loss of a split block, and its gradient for one micro-batch's features."""

    output: StepOutput
    gradients: dict[str, Tensor]
    constants: dict[str, Tensor]  # features without a gradient, for the second pass


def schedule(micros: Sequence[MicroBatch], contrasts: Callable[[str], bool]) -> Iterator[Pass]:
    """Yield the passes of a step in order; split blocks whose samples are contrasted are cached."""
    for block, members in split_blocks(micros, contrasts).items():
        yield from (Pass("features", block, (number,)) for number in members)
        yield Pass("loss", block, tuple(members))
    for number, micro in enumerate(micros):
        yield Pass("backward", micro.block, (number,))


def split_blocks(
    micros: Sequence[MicroBatch], contrasts: Callable[[str], bool]
) -> dict[int, list[int]]:
    """Return the numbers of the micro-batches of each block that the gradient cache puts together.

    contrasts: tells whether the loss compares all samples of a source's block.
    """
    numbers: dict[int, list[int]] = defaultdict(list)
    for number, micro in enumerate(micros):
        if contrasts(micro.source):
            numbers[micro.block].append(number)
    return {block: members for block, members in numbers.items() if len(members) > 1}


def cached_losses(
    loss: Callable[[dict[str, Tensor]], StepOutput],
    rows: Sequence[dict[str, Tensor]],
    training: bool,
) -> list[CachedLoss]:
    """Compute a block's loss from its micro-batches' features, with the gradient for each of them.

    A 0-d feature is a parameter of the loss, such as the logit scale: it is the same in all rows,
    and its gradient goes to the first one. A feature that the loss does not use is a constant.
    Without training there are neither.
    """
    whole = {
        name: torch.cat([row[name] for row in rows]) if value.ndim else value
        for name, value in rows[0].items()
    }
    with torch.set_grad_enabled(training):
        leaves = {
            name: value.detach().requires_grad_(training and value.is_floating_point())
            for name, value in whole.items()
        }
        output = loss(leaves)
        if not training:
            return [CachedLoss(output, {}, {}) for _ in rows]
        inputs = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(output.loss, [*inputs.values()], allow_unused=True)
        gradients = dict(zip(inputs, found, strict=True))
    output = StepOutput(output.loss.detach(), output.metrics)
    cached = [CachedLoss(output, {}, {}) for _ in rows]
    for name, feature in whole.items():
        gradient = gradients.get(name)
        value = feature if gradient is None else gradient
        sizes = [len(row[name]) for row in rows] if value.ndim else []
        pieces = value.split(sizes) if sizes else [value]
        for each, piece in zip(cached, pieces, strict=False):
            (each.constants if gradient is None else each.gradients)[name] = piece
    return cached


def surrogate_loss(features: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
    """Return a scalar whose gradient with respect to the features is the cached one."""
    return torch.stack([(features[name] * each).sum() for name, each in gradients.items()]).sum()
