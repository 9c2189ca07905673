"""Copies to the GPU: on a stream of their own, one micro-batch ahead, and waited for.

A recorder stands for the tensors and streams of CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import train

from data_pipelines.stream.loaded import Loaded
from xray.training import device_batches
from xray.training.device_batches import DeviceBatches

CUDA = torch.device("cuda", 0)


class Stream:
    """Stream that records what is given to it."""

    def __init__(self, name: str, log: list[tuple[Any, ...]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for", other.name))


class Cuda:
    """The part of torch.cuda that is used: streams, and the present one."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.compute, self.copies = Stream("compute", self.log), Stream("copies", self.log)
        self.present = self.compute

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.present = self.present, stream
        yield
        self.present = before

    def current_stream(self, device: torch.device) -> Stream:
        return self.present


class Value:
    """Tensor of a micro-batch, on the host or on the device."""

    def __init__(self, number: int, cuda: Cuda) -> None:
        self.number, self.cuda = number, cuda

    def to(self, device: torch.device, non_blocking: bool) -> Value:
        assert device == CUDA and non_blocking
        self.cuda.log.append((self.cuda.present.name, "copies", self.number))
        return self

    def record_stream(self, stream: Stream) -> None:
        self.cuda.log.append((stream.name, "keeps", self.number))


def test_copies_run_beside_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three forward passes, the last over the first micro-batch again."""
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current_stream)
    monkeypatch.setattr(device_batches, "copy_stream", lambda device: cuda.copies)
    loaded: Any = [Loaded({"pixels": Value(number, cuda)}) for number in range(2)]  # type: ignore[dict-item]
    batches = DeviceBatches(loaded, [0, 1, 0], CUDA)
    for number in (0, 1, 0):
        batch: Any = batches.take(number)
        assert batch["pixels"].number == number
        cuda.log.append((cuda.present.name, "computes", number))
    waits = ("compute", "waits for", "copies")
    assert cuda.log == [
        ("copies", "copies", 0),
        waits, ("compute", "keeps", 0), ("copies", "copies", 1), ("compute", "computes", 0),
        waits, ("compute", "keeps", 1), ("copies", "copies", 0), ("compute", "computes", 1),
        waits, ("compute", "keeps", 0), ("compute", "computes", 0),
    ]  # fmt: skip


def test_batches_on_the_cpu_are_used_as_they_are() -> None:
    pixels = torch.ones(3)
    batches = DeviceBatches([Loaded({"pixels": pixels})], [0, 0], torch.device("cpu"))
    assert batches.take(0)["pixels"] is pixels
    with pytest.raises(AssertionError, match="micro-batch 1 was taken, 0 is the next"):
        batches.take(1)


@pytest.mark.parametrize(
    ("stage", "micro", "order", "validation"),
    [
        ("clip", 4, [0, 1, 0, 1], [0, 1]),  # a split block whose loss spans the batch
        ("clip", 8, [0], [0]),
        ("mae", 4, [0, 1], [0, 1]),
    ],
)
def test_the_order_is_that_of_the_forward_passes(
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    micro: int,
    order: list[int],
    validation: list[int],
) -> None:
    taken: list[list[int]] = []
    honest = DeviceBatches.__init__

    def record(self: DeviceBatches, loaded: Any, numbers: Any, device: torch.device) -> None:
        honest(self, loaded, numbers, device)
        assert not [1 for earlier in made if earlier._left]  # all of the batches were taken
        made.append(self)
        taken.append(list(numbers))

    made: list[DeviceBatches] = []
    monkeypatch.setattr(DeviceBatches, "__init__", record)
    train(
        stage, demo, tmp_path, "data.blocks=[{source: photos, samples: 8}]", "train.samples=8",
        "data.sources.val={shards: heldout, modality: image}",
        "data.validation=[{source: val, samples: 8}]", f"train.micro_batch={micro}",
    )  # fmt: skip
    assert taken == [order, validation] and not made[-1]._left
