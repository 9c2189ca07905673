"""Ranks and collectives: a small facade of torch.distributed, the only reader of RANK.

Torch is imported in functions: the command line asks for its rank before it needs torch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from xray.agreement import Agreement, announce, announced, reason
from xray.errors import ArtifactError, ConfigError, DataError, TrainingError, XrayError
from xray.slurm import SRUN, first_host, is_interactive, tasks_of_node

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LEAVING = 30.0  # seconds that `leave` waits
SETTLED = 0.05  # seconds that `settle` waits
COLLECTIVE = timedelta(hours=2)  # limit of collectives, agreements; train.hang_seconds ends earlier
FAILED = "xray/failed"  # key of the store: why a rank has stopped
PREPARATION = timedelta(days=2)  # of data by rank 0, while the others wait
_NUMBERS = itertools.count(1)  # of agreements, equal on all ranks


def setup_environment() -> None:
    """Set the variables that a launcher sets; without one the world size is 1."""
    env = os.environ
    if "RANK" not in env and env.get(SRUN, "1") != "1" and is_interactive(env):
        print(
            f"xray: this shell is one of {env.pop(SRUN)} tasks of a Slurm step, and this command "
            "runs in it alone; start it with srun to run it in all tasks",
            file=sys.stderr,
        )
    if "RANK" not in env and SRUN in env:
        for name, value in _srun(env).items():
            env.setdefault(name, value)
    if "LOCAL_SIZE" in env:  # its name in DeepSpeed's launcher
        env.setdefault("LOCAL_WORLD_SIZE", env["LOCAL_SIZE"])
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    defaults |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in defaults.items():
        env.setdefault(name, value)


def _srun(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torchrun would set, for a task of srun."""
    values = {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env.get("SLURM_LOCALID", "0")}
    values["WORLD_SIZE"] = env[SRUN]
    if (tasks := tasks_of_node(env)) is not None:
        values["LOCAL_WORLD_SIZE"] = tasks
    # The node of rank 0: srun may have been called on a login node.
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    values["MASTER_ADDR"] = first_host(nodes) or env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    # A port per job and step, below those that the kernel assigns.
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
    values["MASTER_PORT"] = str(10000 + (101 * job + step) % 20000)
    return values


def environment_alone() -> dict[str, str]:
    """Return an environment for a process outside of this one's process group."""
    group = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    group.append(SRUN)
    return {name: value for name, value in os.environ.items() if name not in group}


def launcher() -> str:
    """Return the name of the launcher that started this process."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    if "LOCAL_SIZE" in env:
        return "deepspeed"
    if SRUN in env:
        return "srun"
    return "plain python" if world_size() == 1 else "RANK and WORLD_SIZE in the environment"


def choose_device(wanted: str) -> torch.device:
    """Choose this rank's device (`cuda`, `cpu` or `auto`), before deepspeed is imported.

    Switches tf32 off in cuDNN, so that fp32 is fp32 in convolutions as in matrix products.
    Raises ConfigError if CUDA is wanted and missing, or if there are fewer GPUs than processes.
    """
    import torch

    setup_environment()
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no CUDA device: use cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank()} of this computer sees {torch.cuda.device_count()} GPU(s): "
            "start no more processes than GPUs, and let each see all of them (srun: "
            "--gpus-per-node, not --gpus-per-task)"
        )
    torch.backends.cudnn.allow_tf32 = False  # torch's default is True; False for matmul
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def rank() -> int:
    """Return the rank of this process, 0 outside a process group."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, over all hosts."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the rank of this process on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes on this computer."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def is_main() -> bool:
    """Return True on rank 0."""
    return rank() == 0


@contextlib.contextmanager
def rehearsed(world: int) -> Iterator[None]:
    """Pretend to be rank 0 of `world` processes, for planning; collectives return immediately."""
    import torch.distributed

    if world == world_size():
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world)}
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks, in place, and return it."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.all_reduce(values)
    return values


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks in the order of ranks; every rank has equally many."""
    import torch.distributed

    gathered = rows.new_empty(len(rows) * world_size(), *rows.shape[1:])
    # torch 2.14 renamed these two collectives and warns about the old names
    old = torch.distributed.all_gather_into_tensor
    getattr(torch.distributed, "all_gather_single", old)(gathered, rows)
    return gathered


def sum_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of the rows, summed over ranks: the reverse of `gather_rows`."""
    import torch.distributed

    own = rows.new_empty(len(rows) // world_size(), *rows.shape[1:])
    old = torch.distributed.reduce_scatter_tensor
    getattr(torch.distributed, "reduce_scatter_single", old)(own, rows.contiguous())
    return own


def rows_of(number: int, rows: int) -> slice:
    """Return the rows of rank `number` if `rows` are divided over all ranks."""
    return slice(number * rows // world_size(), (number + 1) * rows // world_size())


def largest_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Replace a tensor's values by the largest ones over ranks, in place, and return it."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values


def max_over_ranks(value: float, device: torch.device) -> float:
    """Return the largest value over ranks."""
    if world_size() == 1:
        return value
    import torch

    box = torch.tensor(value, dtype=torch.float64, device=device)
    return float(to_host(largest_over_ranks(box)))


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if world_size() == 1:
        return value
    import torch.distributed

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Gather every rank's value on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed

    boxes: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(boxes, value)
    return boxes


def to_host(value: torch.Tensor | float) -> Any:
    """Read a tensor's values from the device; numbers are returned as they are.

    NCCL's collectives return immediately: a rank waits for the others where it reads a result. The
    watchdog recognizes a wait in this module.
    """
    return value if isinstance(value, float | int) else value.tolist()


def main_first(work: Callable[[], T], doing: str = "") -> T:
    """Call work on rank 0, then on the other ranks, which may read what it has written.

    doing: name of the work for the messages of ranks that wait, up to PREPARATION. Raises an error
    of one rank on all ranks.
    """
    result: list[T] = []

    def keep() -> None:
        result.append(work())

    for mine in (is_main(), not is_main()):
        together(keep if mine else lambda: None, PREPARATION, doing=doing)
    return result[0]


def on_main(work: Callable[[], object], patience: timedelta = COLLECTIVE, doing: str = "") -> None:
    """Call work on rank 0 only; raises its error on all ranks, so that none waits for it."""
    together(work if is_main() else lambda: None, patience, ArtifactError, doing)


def together(
    work: Callable[[], object],
    patience: timedelta = COLLECTIVE,
    kind: type[XrayError] = DataError,
    doing: str = "",
) -> None:
    """Call work on each rank and raise an error of one on all; an OSError becomes a `kind`.

    Work may itself call `agree`; an error that this raises is not agreed upon again.
    """
    failure: XrayError | None = None
    try:
        work()
    except XrayError as error:
        if error.agreed or error.parted:
            raise
        failure = error
    except OSError as error:
        failure = kind(str(error))
    except BaseException as error:  # a bug or an interrupt: the others would wait for this rank
        if world_size() > 1:
            _agreement(patience, doing).stop(error)
        raise
    agree(failure, patience, doing)


def leave() -> None:
    """End all ranks together, as the last call of a process. Waits up to LEAVING seconds.

    Gloo reports a rank that has exited as a failure of the others' collectives, and its threads
    abort a process whose interpreter ends while one of them frees a tensor.
    """
    if world_size() == 1:
        return
    import torch.distributed

    if not torch.distributed.is_initialized():
        return
    store = _store()
    until = time.monotonic() + LEAVING

    def wait(key: str, ranks: int) -> bool:
        while (there := store.add(key, 0)) < ranks and time.monotonic() < until:
            time.sleep(0.02)
        return there >= ranks

    with contextlib.suppress(RuntimeError):  # the rank that holds the store has exited
        store.add("xray/done", 1)
        if wait("xray/done", world_size()):  # without all ranks it could wait forever
            torch.distributed.destroy_process_group()
        if is_main():  # it may hold the store, so it exits last
            wait("xray/gone", world_size() - 1)
        else:
            store.add("xray/gone", 1)


def settle(workers: int) -> None:
    """Wait until the threads of collectives are idle, before `workers` processes are forked.

    Until Python 3.12 a process that is forked while another thread enters the interpreter hangs.
    Gloo's threads do so to free a tensor: about 1 in 100 forks after an all-reduce would hang.
    """
    distributed = sys.modules.get("torch.distributed")
    if workers and distributed is not None and distributed.is_initialized():
        time.sleep(SETTLED)


def joining() -> contextlib.AbstractContextManager[None]:
    """Return a context in which this rank joins the process group, and says whom it waits for."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = "rank 0" if rank() else f"the other {world_size() - 1} of {world_size()} processes"
    return announced(
        "xray" if is_main() else f"xray, rank {rank()}",
        f"waiting for {who} to join the process group at {place}",
        f"this is rank {rank()}, started by {launcher()}; start all ranks, or unset RANK, "
        f"WORLD_SIZE and {SRUN} to run one process",
    )


def join() -> None:
    """Make this rank known to the others, after it has joined the process group."""
    if world_size() > 1:
        announce(_store(), rank())


def agree(error: XrayError | None, patience: timedelta = COLLECTIVE, doing: str = "") -> None:
    """Raise an error of any rank on every rank, so that no rank enters a collective alone.

    It uses no collective. A waiting rank prints the ranks it waits for. Raises TrainingError if a
    rank does not arrive within the patience.
    """
    if world_size() > 1:
        try:
            error = _agreement(patience, doing).reach(error)
        except TrainingError as lost:
            lost.parted = True
            raise
    if error is not None:
        raise error.on_all_ranks()


def report_failure(error: BaseException) -> None:
    """Announce to the other ranks that this one ends, unless all of them raise the error."""
    if world_size() == 1 or getattr(error, "agreed", False):
        return
    facts = {"rank": rank(), "text": reason(rank(), error)}
    with contextlib.suppress(RuntimeError):  # the rank that holds the store has exited
        _store().set(FAILED, json.dumps(facts))


def reported_failure() -> str | None:
    """Return what another rank has reported by `report_failure`."""
    if world_size() == 1 or not _store().check([FAILED]):
        return None
    facts = json.loads(_store().get(FAILED))
    return None if facts["rank"] == rank() else str(facts["text"])


def _agreement(patience: timedelta, doing: str) -> Agreement:
    """Return the next agreement; one rank of each host prints, if rank 0 is missing."""
    speaks = local_rank() == 0 or rank() == 1
    place = _store(), next(_NUMBERS), rank(), world_size()
    return Agreement(*place, patience, doing, speaks)


def _store() -> Any:
    import torch.distributed

    return torch.distributed.distributed_c10d._get_default_store()
