"""Contrastive losses and gradients of several ranks, which are forked from one process.

usage: contrast_ranks.py WORLD DTYPE MOST_LOGITS FOLDER
Rank 0 writes the results to FOLDER/found.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from forked_ranks import run_ranks
from torch import Tensor

from xray.losses import contrastive as losses

BATCH, WIDTH = 30, 7  # global batch size, the same for every world size, and feature width
GROUPS = [0, 0, 0, *range(1, 25), 3, 4, 24]  # group id of each row; equal ids are positive pairs
# Ids of the images and of the texts; pairs with equal ids are positive. None = row i pairs with row
# i.
PAIRINGS: dict[str, tuple[list[int] | None, list[int] | None]] = {
    "apart": (None, None),
    "groups": (GROUPS, GROUPS),
    "captions": (list(range(BATCH)), [i // 2 for i in range(2 * BATCH)]),
}
LOSSES = ("info_nce", "sigmoid_loss", "contrast", "distillation")


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the inputs of the global batch: images, two texts per row, and the parameters."""
    torch.manual_seed(0)
    images, first, second = torch.randn(3, BATCH, WIDTH, dtype=torch.float64)
    texts = torch.stack([first, second], dim=1)
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    values = {"images": images, "texts": texts, "weight": weight}
    values |= {"scale": torch.tensor([3.0]), "bias": torch.tensor([-1.5])}
    return {name: value.to(dtype) for name, value in values.items()}


def features(values: dict[str, Tensor], rows: slice, texts: int) -> tuple[Tensor, Tensor]:
    """Compute image and text features of some rows; both depend on the parameter `weight`."""
    images = F.normalize(values["images"][rows] @ values["weight"], dim=-1)
    flat = values["texts"][rows, :texts].flatten(0, 1)
    return images, F.normalize(flat @ values["weight"].t(), dim=-1)


def cases() -> list[tuple[str, str]]:
    """List all cases as (loss, pairing)."""
    extra = [("contrast", "negatives"), ("distillation", "apart")]
    return [(loss, pairing) for loss in LOSSES[:2] for pairing in PAIRINGS] + extra


def texts_of(pairing: str) -> int:
    """Return the number of texts per row."""
    return 2 if pairing in ("captions", "negatives") else 1


def ids_of(pairing: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the ids of images and of texts; -1 = the text is left out of the loss."""
    if pairing == "negatives":  # every second text is a hard negative, every tenth is left out
        keys = [i // 2 if i % 2 == 0 else (-1 if i % 10 == 1 else BATCH + i) for i in range(60)]
        return torch.arange(BATCH), torch.tensor(keys)
    return tuple(None if ids is None else torch.tensor(ids) for ids in PAIRINGS[pairing])  # type: ignore[return-value]


def teacher(values: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    """Compute a teacher's image and text features of some rows."""
    sides = values["images"][rows, :5], values["texts"][rows, 0, 1:6]
    return F.normalize(sides[0], dim=-1), F.normalize(sides[1], dim=-1)


def run(rank: int, world: int, dtype: torch.dtype, folder: Path) -> None:
    """Compute all cases on one rank; average losses and gradients over the ranks."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    results = {}
    for name, pairing in cases():
        values, texts = inputs(dtype), texts_of(pairing)
        leaves = [values[n].requires_grad_() for n in ("weight", "scale", "bias")]
        more: list[Any] = [values["bias"]] if name == "sigmoid_loss" else []
        if name == "distillation":
            more = [*(x.detach() for x in teacher(values, rows)), 7.0]
        else:
            query_ids, key_ids = ids_of(pairing)
            text_rows = slice(rows.start * texts, rows.stop * texts)
            more.append(None if query_ids is None else query_ids[rows])
            more.append(None if key_ids is None else key_ids[text_rows])
        loss = getattr(losses, name)(*features(values, rows, texts), values["scale"], *more)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        row = [loss.detach(), *(torch.zeros(1) if g is None else g for g in grads)]
        sums = [x.double().clone() for x in row]
        for x in sums:
            torch.distributed.all_reduce(x)
        results[f"{name}, {pairing}"] = [(x / world).flatten().tolist() for x in sums]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def main() -> None:
    """Fork the ranks; exit with 1 if one of them fails."""
    world, dtype, folder = int(sys.argv[1]), getattr(torch, sys.argv[2]), Path(sys.argv[4])
    losses.MOST_LOGITS = int(sys.argv[3])
    run_ranks(run, world, dtype, folder)


if __name__ == "__main__":
    main()
