"""Copies of a step's micro-batches to the device, beside its computation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data_pipelines.decode.device import copy_stream
from data_pipelines.stream.loaded import Fields, Loaded


class DeviceBatches:
    """Micro-batches on the device, in the order of a step's forward passes.

    On a GPU, batches are copied on a stream of their own, one ahead of the pass that needs them.
    Pixels that were decoded on the GPU (`data.decode`) come from the same stream, without a copy.
    order: numbers of the micro-batches, once per forward pass.
    """

    def __init__(
        self, loaded: Sequence[Loaded], order: Sequence[int], device: torch.device
    ) -> None:
        self.loaded, self.device = loaded, device
        self._left = list(reversed(order))
        self._stream = copy_stream(device) if device.type == "cuda" else None
        self._ahead: Fields | None = None  # its copy has begun

    def take(self, number: int) -> Fields:
        """Return micro-batch `number`, the next in the order, and start to copy the one after."""
        expected = self._left.pop()
        assert number == expected, f"micro-batch {number} was taken, {expected} is the next"
        if self._stream is None:
            return self._copied(number)
        batch = self._begun(number) if self._ahead is None else self._ahead
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for value in batch.values():
            value.record_stream(computing)  # its memory is not reused before the pass has ended
        self._ahead = self._begun(self._left[-1]) if self._left else None
        return batch

    def _begun(self, number: int) -> Fields:
        with torch.cuda.stream(self._stream):
            return self._copied(number)

    def _copied(self, number: int) -> Fields:
        batch = self.loaded[number].batch
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
