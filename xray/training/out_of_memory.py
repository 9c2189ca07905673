"""Error of a step that does not fit into the device's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from xray import dist
from xray.config import RunConfig
from xray.config.schedule import value_at
from xray.errors import TrainingError


@contextlib.contextmanager
def explained(config: RunConfig, step: int, device: torch.device) -> Iterator[None]:
    """Context of a step's work on the device.

    Raises TrainingError that says what did not fit and what to set, if memory runs out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(_message(config, step, device)) from error


def _message(config: RunConfig, step: int, device: torch.device) -> str:
    progress, data = config.progress(step), config.data
    resolution = value_at(data.resolution, progress)
    whole = max(block.samples for block in config.blocks) // dist.world_size()
    micro = min(value_at(config.train.micro_batch, progress) or whole, whole)
    video = any(data.sources[b.source].modality == "video" for b in config.blocks)
    frames = f" and {value_at(data.frames, progress)} frames" if video else ""
    held = ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        numbers = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), free
        allocated, reserved, free_gb = (n / 1e9 for n in numbers)
        held = (
            f"; of {total / 1e9:.1f} GB, tensors hold {allocated:.1f}, the allocator "
            f"{reserved:.1f}, and {free_gb:.1f} are free"
        )
    return (
        f"out of memory on {device} in step {step + 1}, with micro-batches of {micro} samples of "
        f"{resolution} px{frames}{held}; {_advice(config, micro)}"
    )


def _advice(config: RunConfig, micro: int) -> str:
    ways = [f"train.micro_batch={micro // 2}" if micro > 1 else ""]
    ways += ["" if config.model.grad_checkpointing else "model.grad_checkpointing=true"]
    ways += [f"zero.stage={config.zero.stage + 1}" if config.zero.stage < config.zero_limit else ""]
    ways += ["" if config.zero.offload or not config.zero.stage else "zero.offload=true"]
    wanted = ", ".join(filter(None, ways)) or "a smaller data.resolution or model"
    return (
        f"set one or more of {wanted}; `xray plan` shows what takes the memory, and "
        "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment may help"
    )
