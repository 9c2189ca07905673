"""Forward and backward of micro-batches of all stages make the host wait for no value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_variants import VARIANTS, losses, make
from torch import Tensor

from tools.common.host_reads import HostReads
from xray.config import TextConfig
from xray.models.llm_folder import load_llm
from xray.models.text_tower import TextTower

# Functions that read values of tensors which stay on the CPU, and what they read.
ALLOWED = {
    "stages/hashtag.py:features": "the progress, for a loss that truncates",
    "stages/hashtag.py:loss_from_features": "the progress, and a random number for truncation",
    "xray/models/mixup.py:mix": "random numbers: the kind of mixing and its ratio",
    "xray/models/mixup.py:<genexpr>": "random numbers: the corner of the rectangle",
}


def reads_of(name: str, root: Path) -> HostReads:
    module, batch = make(VARIANTS[name], root)
    with HostReads("cpu") as reads:
        for loss in losses(VARIANTS[name], module, batch):
            loss.backward()  # type: ignore[no-untyped-call]
    return reads


@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batches_make_no_host_read(name: str, llm_root: Path) -> None:
    assert [read for read in reads_of(name, llm_root).found if read.place not in ALLOWED] == []


def test_each_exception_is_needed(llm_root: Path) -> None:
    names = ("hashtag truncate", "hashtag cutmix")
    found = {read.place for name in names for read in reads_of(name, llm_root).found}
    assert found == ALLOWED.keys()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("padding", [0, 5])
def test_an_llm_whose_mask_is_not_read_computes_the_same(
    attention: Any, padding: int, llm_root: Path
) -> None:
    config = TextConfig(tune="none", attention=attention, pooling="last", lora_rank=0)
    ids = torch.randint(3, 200, (4, 12))
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(12) < 12 - padding).long()[None]}
    inputs["attention_mask"] = inputs["attention_mask"].repeat(4, 1)
    towers: list[Any] = [
        TextTower(config, llm_root / "llm").llm,
        load_llm(llm_root / "llm", attention),
    ]
    results, reads = [], []
    for llm in towers:
        with torch.no_grad(), HostReads("cpu") as each:
            results.append(llm.eval()(**inputs).last_hidden_state[:, : 12 - padding])
        reads.append(len(each.found))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert reads[0] == 0
    assert reads[1] > 0, "transformers reads no mask any more: remove `_always_mask`"


def values(x: Tensor) -> None:
    float(x.sum())


def truth(x: Tensor) -> None:
    assert (x == x).all()


def mask(x: Tensor) -> None:
    x[x > 0]


def places(x: Tensor) -> None:
    torch.where(x > 0)


def repeats(x: Tensor) -> None:
    torch.repeat_interleave(x, torch.ones_like(x, dtype=torch.long))


def python_values(x: Tensor) -> None:
    torch.tensor([1.0, 2.0])


def new_values(x: Tensor) -> None:
    x.new_tensor(0.5)


def same_values(x: Tensor) -> None:
    torch.equal(x, x)


READS = {
    values: "_local_scalar_dense",
    truth: "_local_scalar_dense",
    mask: "index with a mask",
    places: "nonzero",
    repeats: "repeat_interleave.Tensor",
    python_values: "a tensor of Python values",
    new_values: "a tensor of Python values",
    same_values: "equal",
}


@pytest.mark.parametrize("read", READS)
def test_a_planted_read_is_found(read: Callable[[Tensor], None]) -> None:
    x = torch.rand(4)
    with HostReads("cpu") as reads:
        read(x)
    (found,) = reads.found
    assert found.operation == READS[read]
    assert found.place == f"tests/gpu/test_host_reads.py:{read.__name__}"


def test_a_read_in_a_backward_pass_is_found() -> None:
    x = torch.rand(4, requires_grad=True)
    picked = x[x > 0.5].sum()
    with HostReads("cpu") as reads:
        picked.backward()  # type: ignore[no-untyped-call]
    assert [read.operation for read in reads.found] == ["index with a mask"]


def test_other_operations_are_no_reads() -> None:
    x = torch.rand(4)
    with HostReads("cpu") as reads:
        x[x > 0.5] = x.new_zeros(())  # a fill
        x[:2] += x.new_full((), 0.5)
        x[torch.arange(2)].topk(1)
        torch.where(x > 0, x, 1.0)
        torch.ones(3).to(x.device, non_blocking=True)
    assert not reads.found
