"""The only reader of RANK and WORLD_SIZE: a small facade over torch.distributed."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as torch_dist

from xray.errors import ConfigError


def setup_environment() -> None:
    """Fill in what a launcher would have set, so that a plain `python` run is a world of one."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
        os.environ.setdefault("MASTER_ADDR", os.environ.get("SLURM_LAUNCH_NODE_IPADDR", ""))
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    defaults |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def choose_device(wanted: str) -> torch.device:
    """The device of this rank; call it before deepspeed is imported, which settles on one.

    Raises ConfigError when CUDA is asked for and missing.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no CUDA device: use cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes on this computer."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if torch_dist.is_initialized():
        torch_dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """All-reduce a tensor in place (sum) and return it."""
    if world_size() > 1:
        torch_dist.all_reduce(values)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(boxes, value)
    return boxes
