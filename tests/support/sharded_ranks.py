"""Tag losses over classes that are divided over ranks, which are forked from one process.

usage: sharded_ranks.py WORLD DTYPE FOLDER
Each rank writes its results to FOLDER/RANK.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed
from forked_ranks import run_ranks
from torch import Tensor

from xray import dist
from xray.losses import tags as losses
from xray.losses.sharded_classes import sharded_loss

SAMPLES, WIDTH, CLASSES = 6, 5, 11  # samples of a rank
Inputs = dict[str, Tensor]
CASES: dict[str, losses.TagLoss] = {
    "softmax": losses.SoftmaxLoss(),
    "softmax, in chunks": losses.SoftmaxLoss(chunk=2),
    "softmax, smoothed": losses.SoftmaxLoss(smoothing=0.2, chunk=3),
    "bce": losses.BinaryLoss(smoothing=0.1),
    "asymmetric, in chunks": losses.AsymmetricLoss(smoothing=0.1, chunk=2),
}


def inputs(world: int, dtype: torch.dtype) -> Inputs:
    """Draw a head and the samples of all ranks, with soft targets and the ids of mixed samples."""
    torch.manual_seed(0)
    rows = world * SAMPLES
    tags = torch.randint(CLASSES, (rows, 3))
    tags[::4, 2] = -1
    weights = torch.rand(rows, 3, dtype=torch.float64).masked_fill(tags < 0, 0)
    mixed = torch.cat([tags, tags.roll(1, 0)], dim=1)  # ids that may occur twice in a row
    targets = torch.cat([0.7 * weights, 0.3 * weights.roll(1, 0)], dim=1)
    values = {
        "features": 2 * torch.randn(rows, WIDTH, dtype=torch.float64),
        "weight": torch.randn(CLASSES, WIDTH, dtype=torch.float64),
        "bias": torch.randn(CLASSES, dtype=torch.float64),
        "targets": targets,
    }
    return {name: value.to(dtype) for name, value in values.items()} | {"tags": mixed}


def reduced(losses_of_rank: Tensor) -> Tensor:
    """Reduce the losses of a rank as a stage does that truncates them."""
    return losses.truncate(losses_of_rank, losses_of_rank, 0.2, 0.0)


def run(rank: int, world: int, dtype: torch.dtype, folder: Path) -> None:
    """Compute all cases on one rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    own, classes = slice(rank * SAMPLES, (rank + 1) * SAMPLES), dist.rows_of(rank, CLASSES)
    results = {}
    for name, loss in CASES.items():
        given = inputs(world, dtype)
        parts = given["features"][own], given["weight"][classes], given["bias"][classes]
        leaves = [part.clone().requires_grad_() for part in parts]
        labels = given["tags"][own], given["targets"][own]
        rows, top = sharded_loss(loss, *leaves, *labels, CLASSES)
        results[name] = [rows.detach(), top, *torch.autograd.grad(reduced(rows), leaves)]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def main() -> None:
    """Fork the ranks; exit with 1 if one of them fails."""
    world, dtype, folder = int(sys.argv[1]), getattr(torch, sys.argv[2]), Path(sys.argv[3])
    run_ranks(run, world, dtype, folder)


if __name__ == "__main__":
    main()
