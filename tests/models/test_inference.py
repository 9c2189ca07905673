"""Inference helpers: precision, its record, and results that are read one batch late."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xray.models.inference import autocast, one_behind, recorded

CPU = torch.device("cpu")


def test_bf16_is_autocast_and_fp32_keeps_the_precision_around_it() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with autocast(CPU, "bf16"):
        assert layer(x).dtype == torch.bfloat16
        with autocast(CPU, "fp32"):  # a frozen model inside a training step
            assert layer(x).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert layer(x).dtype == torch.float32


def test_only_bf16_is_recorded() -> None:
    assert recorded("fp32") == {} and recorded("bf16") == {"precision": "bf16"}


def test_a_batch_is_read_after_the_next_one_is_computed() -> None:
    events: list[str] = []

    def batches() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for number in range(3):
            events.append(f"computed {number}")
            yield number, {"rows": torch.full((2,), number)} if number != 1 else {}

    for number, batch in one_behind(batches()):
        events.append(f"read {number}")
        assert batch == {} or batch["rows"].tolist() == [number, number]
        assert bool(batch) == (number != 1)
    order = ["computed 0", "computed 1", "read 0", "computed 2", "read 1", "read 2"]
    assert events == order
    assert list(one_behind(iter(()))) == []
