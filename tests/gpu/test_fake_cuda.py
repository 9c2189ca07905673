"""Forward passes of all stages on fake CUDA tensors: no mix of devices and no host read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda, problems, to_fake, to_fake_module
from stage_variants import VARIANTS, losses, make
from torch import Tensor

# The gradient cache needs backward passes, which need a CUDA context.
FORWARDS = [name for name, variant in VARIANTS.items() if not variant.cached]


def forward(name: str, root: Path, plant: Callable[[Tensor], object] | None = None) -> list[str]:
    """List the problems of a variant's forward pass; plant: a fault before it, of some pixels."""
    module, batch = make(VARIANTS[name], root)

    def work() -> None:
        to_fake_module(module)
        fakes = {key: to_fake(value) for key, value in batch.items()}
        if plant is not None:
            plant(fakes["pixels"])
        for loss in losses(VARIANTS[name], module, fakes):
            assert loss.device.type == "cuda"

    return problems(work)


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_pass_mixes_no_devices_and_reads_no_value(name: str, llm_root: Path) -> None:
    assert forward(name, llm_root) == []


def plant_mix(pixels: Tensor) -> None:
    pixels.add(torch.ones(pixels.shape))


def plant_item(pixels: Tensor) -> None:
    pixels.sum().item()


def plant_mask(pixels: Tensor) -> None:
    pixels[pixels > 0]


def plant_tensor(pixels: Tensor) -> None:
    torch.tensor(0.5, device=pixels.device)


def plant_new_tensor(pixels: Tensor) -> None:
    pixels.new_tensor([1, 2])


def plant_cpu_index(pixels: Tensor) -> None:
    pixels[torch.tensor([0, 1])]


def plant_unpinned(pixels: Tensor) -> None:
    torch.ones(3).to(pixels.device, non_blocking=True)


def plant_blocking(pixels: Tensor) -> None:
    torch.ones(3).pin_memory().to(pixels.device)


def plant_cpu(pixels: Tensor) -> None:
    pixels.cpu()


PLANTS = {
    plant_mix: "FakeTensorDeviceMismatchError|found at least two devices|found two different",
    plant_item: "_local_scalar_dense in",
    plant_mask: "index with a mask in",
    plant_tensor: "copy cpu -> cuda in",
    plant_new_tensor: "copy cpu -> cuda in",
    plant_cpu_index: "index from the host in",
    plant_unpinned: "copy cpu -> cuda in",
    plant_blocking: "copy cpu -> cuda in",
    plant_cpu: "copy cuda -> cpu in",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(plant: Callable[[Tensor], object], llm_root: Path) -> None:
    found = forward("hashtag evit", llm_root, plant)
    assert found
    pattern = PLANTS[plant]
    place = f" in tests/gpu/test_fake_cuda.py:{plant.__name__}, line "
    if pattern.endswith(" in"):
        assert found[0].startswith(pattern.removesuffix(" in") + place)
    else:
        assert any(each in found[0] for each in pattern.split("|"))


def test_a_copy_from_pinned_memory_that_does_not_block_is_no_read() -> None:
    with fake_cuda() as reads:
        copied = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert copied.device.type == "cuda" and not reads.found
