"""Contrastive losses and gradients of several ranks, which are forked from one process.

usage: contrast_ranks.py WORLD DTYPE MOST_LOGITS FOLDER
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from xray import losses

BATCH, WIDTH = 30, 7  # of all ranks, the same at every world size
GROUPS = [0, 0, 0, *range(1, 25), 3, 4, 24]  # rows that belong together


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    images, texts = torch.randn(2, BATCH, WIDTH, dtype=torch.float64)
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    found = {"images": images, "texts": texts, "weight": weight}
    found |= {"scale": torch.tensor([3.0]), "bias": torch.tensor([-1.5])}
    return {name: value.to(dtype) for name, value in found.items()}


def features(given: dict[str, Tensor], own: slice) -> tuple[Tensor, Tensor]:
    """Both sides depend on the weight, as both towers depend on their parameters."""
    images = F.normalize(given["images"][own] @ given["weight"], dim=-1)
    return images, F.normalize(given["texts"][own] @ given["weight"].t(), dim=-1)


def run(rank: int, world: int, dtype: torch.dtype, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    found = {}
    for name in ("info_nce", "sigmoid_loss"):
        for groups in (None, torch.tensor(GROUPS)[own]):
            given = inputs(dtype)
            leaves = [given[n].requires_grad_() for n in ("weight", "scale", "bias")]
            more = (given["bias"],) if name == "sigmoid_loss" else ()
            arguments = (*features(given, own), given["scale"], *more, groups)
            loss = getattr(losses, name)(*arguments)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            row = [loss.detach(), *(torch.zeros(1) if g is None else g for g in grads)]
            mean = [x.double().clone() for x in row]
            for x in mean:
                torch.distributed.all_reduce(x)
            found[f"{name}, {'apart' if groups is None else 'groups'}"] = [
                (x / world).flatten().tolist() for x in mean
            ]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def main() -> None:
    world, dtype, folder = int(sys.argv[1]), getattr(torch, sys.argv[2]), Path(sys.argv[4])
    losses.MOST_LOGITS = int(sys.argv[3])
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(r, world, dtype, folder)) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
