"""Tasks of srun, read from their environment, and shells that only look like one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SRUN = "SLURM_STEP_NUM_TASKS"  # in a task of srun, and not in a job's script
INTERACTIVE_STEP = str(0xFFFFFFFA)  # id of the step in which salloc opens a shell


def is_interactive(env: Mapping[str, str]) -> bool:
    """Return True for a command in the shell of `srun --pty bash` or of salloc.

    The shell is a task, and a command in it inherits its variables, but no other task runs it.
    """
    return env.get("SLURM_STEP_ID") == INTERACTIVE_STEP or under_job_control()


def under_job_control() -> bool:
    """Return True if an interactive shell has started this process as a job.

    A task has no terminal, or, with --pty, the process group of its session's leader. Only shells
    with job control start commands in other groups.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return os.getpgrp() != os.getsid(0)


def tasks_of_node(env: Mapping[str, str]) -> str | None:
    """Return the number of tasks on this task's node, from a list such as "4(x2),3"."""
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    tasks: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        tasks += [count] * int(times or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return tasks[node] if node < len(tasks) else None


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm host list: gpu004-ib of `gpu[004-007,9]-ib,login2`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")
