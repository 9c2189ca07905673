"""Runs a function on forked ranks, which share the imports of this process."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable

import torch


def run_ranks(run: Callable[..., None], world: int, *given: object) -> None:
    """Call `run(rank, world, *given)` in each rank; exit with 1 if one of them fails."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank, world, *given)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
