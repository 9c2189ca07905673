"""Encoding dealt over the ranks: rank 0 runs the suites, and every rank encodes some batches.

Rank 0 gives the other ranks one task after another. Between tasks they wait for rank 0, which may
fit a probe for hours, by an agreement instead of a collective. The batches of a task are those of
one process, so that their results are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from xray import dist
from xray.artifacts.encoders import TextEncoder, VisionEncoder


class Task(Protocol):
    """Encoding of numbered batches; it is pickled. Tensors of all batches differ only in rows."""

    @property
    def name(self) -> str:
        """Return the name of the data, for progress."""

    def __len__(self) -> int: ...

    def rows(self, number: int) -> int:
        """Return the number of rows of a batch; the first batch has the most."""

    def encode(self, encoder: Any, numbers: Iterable[int]) -> Iterator[Mapping[str, Tensor]]:
        """Yield tensors [rows, ...] by name of each of these batches."""


def encoded(
    encoder: VisionEncoder | TextEncoder, task: Task, dealt: bool
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the tensors of each batch of a task, in order; dealt: over all ranks, as rank 0."""
    if dealt:
        _next_task(encoder, task)
        yield from _share(encoder, task)
    else:
        yield from task.encode(encoder, range(len(task)))


def serve(encoder: VisionEncoder | TextEncoder) -> None:
    """Encode this rank's batches of each task of rank 0, until `dismiss`; raises its errors."""
    while (task := _next_task(encoder, None)) is not None:
        for _ in _share(encoder, task):
            pass


def dismiss(encoder: VisionEncoder | TextEncoder) -> None:
    """End `serve` on the other ranks, as rank 0."""
    _next_task(encoder, None)


def _next_task(encoder: VisionEncoder | TextEncoder, task: Task | None) -> Task | None:
    """Return rank 0's task on all ranks, whose encoders then reduce tokens as its encoder does."""
    dist.agree(None, dist.PREPARATION, "evaluating")
    own = None
    if isinstance(encoder, VisionEncoder):
        own = encoder.keep_rate, encoder.vision.reduction
    task, reduction = dist.broadcast_object((task, own))
    if isinstance(encoder, VisionEncoder):
        encoder.keep_rate, encoder.vision.reduction = reduction
    return task


def _share(encoder: VisionEncoder | TextEncoder, task: Task) -> Iterator[Mapping[str, Tensor]]:
    """Encode every `world`th batch; yields all batches in order, on the encoder's device.

    Each round has a batch of each rank. In the last one some ranks have none and send an earlier
    one, which nobody reads: a collective needs equal shapes.
    """
    world, most = dist.world_size(), task.rows(0) if len(task) else 0
    device = next(encoder.parameters()).device
    mine = task.encode(encoder, range(dist.rank(), len(task), world) or range(1))
    last: Mapping[str, Tensor] = {}

    def encode() -> None:
        nonlocal last
        last = next(mine, last)

    for first in range(0, len(task), world):
        dist.together(encode, doing=f"encoding {task.name}")
        batches = {name: _gathered(rows.to(device), most) for name, rows in last.items()}
        for place in range(min(world, len(task) - first)):
            rows = slice(place * most, place * most + task.rows(first + place))
            yield {name: every[rows] for name, every in batches.items()}


def _gathered(rows: Tensor, most: int) -> Tensor:
    """Gather the rows of all ranks, each padded to `most`: [world * most, ...]."""
    padding = rows.new_zeros(most - len(rows), *rows.shape[1:])
    return dist.gather_rows(torch.cat([rows, padding]))
