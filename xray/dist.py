"""The only reader of RANK and WORLD_SIZE: a small facade over torch.distributed.

Torch is imported inside: the command line asks for its rank before it needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from xray.errors import ConfigError, DataError, XrayError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
PREPARATION = timedelta(days=2)  # of data by rank 0, while the others wait


def setup_environment() -> None:
    """Fill in what a launcher would have set; without one, a plain run is a world of one."""
    env = os.environ
    if "RANK" not in env and "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # a task of srun
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        if "SLURM_NTASKS_PER_NODE" in env:
            env.setdefault("LOCAL_WORLD_SIZE", env["SLURM_NTASKS_PER_NODE"])
        if "SLURM_LAUNCH_NODE_IPADDR" in env:
            env.setdefault("MASTER_ADDR", env["SLURM_LAUNCH_NODE_IPADDR"])
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    defaults |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in defaults.items():
        env.setdefault(name, value)


def choose_device(wanted: str) -> torch.device:
    """The device of this rank; call it before deepspeed is imported, which settles on one.

    Raises ConfigError when CUDA is asked for and missing.
    """
    import torch

    setup_environment()
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


@contextmanager
def rehearsed(world: int) -> Iterator[None]:
    """As if this process were rank 0 of a world, whose other ranks answer without a word.

    For counting what a step would take: collectives return at once, and nothing is sent.
    """
    import torch.distributed

    if world == world_size():
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world)}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def barrier() -> None:
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """All-reduce a tensor in place (sum) and return it."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.all_reduce(values)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    import torch.distributed

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any, patience: timedelta | None = None) -> list[Any]:
    """Every rank's value, on every rank; patience: how long to wait for the slowest, if for longer
    than for any other collective."""
    if world_size() == 1:
        return [value]
    import torch.distributed as torch_dist

    boxes: list[Any] = [None] * world_size()
    if patience is None:
        torch_dist.all_gather_object(boxes, value)
        return boxes
    group: Any = torch_dist.new_group(backend="gloo", timeout=patience)
    torch_dist.all_gather_object(boxes, value, group=group)
    torch_dist.destroy_process_group(group)
    return boxes


def main_first(work: Callable[[], T]) -> T:
    """work() on rank 0, then on the others, who may find what it has written; raises on all ranks
    what one ran into. They wait for as long as a large corpus may take to prepare."""
    result: list[T] = []
    for mine in (is_main(), not is_main()):
        failure: XrayError | None = None
        if mine:
            try:
                result.append(work())
            except XrayError as error:
                failure = error
            except OSError as error:
                failure = DataError(str(error))
        agree(failure, PREPARATION)
    return result[0]


def agree(error: XrayError | None, patience: timedelta | None = None) -> None:
    """Raise on every rank what any rank ran into: none goes on into a collective alone."""
    for found in gather_objects(error, patience):
        if found is not None:
            found.agreed = True
            raise found
