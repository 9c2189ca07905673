"""Contrastive losses and gradients of several ranks, which are forked from one process.

usage: contrast_ranks.py WORLD DTYPE MOST_LOGITS FOLDER
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from xray.losses import contrastive as losses

BATCH, WIDTH = 30, 7  # of all ranks, the same at every world size
GROUPS = [0, 0, 0, *range(1, 25), 3, 4, 24]  # rows that belong together
# Texts in all, and the rows they belong to; None = row i belongs to row i, -1 = to be left out.
PAIRINGS: dict[str, tuple[list[int] | None, list[int] | None]] = {
    "apart": (None, None),
    "groups": (GROUPS, GROUPS),
    "captions": (list(range(BATCH)), [i // 2 for i in range(2 * BATCH)]),
}
LOSSES = ("info_nce", "sigmoid_loss", "contrast", "distillation")


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    images, texts, more = torch.randn(3, BATCH, WIDTH, dtype=torch.float64)
    texts = torch.stack([texts, more], dim=1)  # two of each row
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    found = {"images": images, "texts": texts, "weight": weight}
    found |= {"scale": torch.tensor([3.0]), "bias": torch.tensor([-1.5])}
    return {name: value.to(dtype) for name, value in found.items()}


def features(given: dict[str, Tensor], own: slice, texts: int) -> tuple[Tensor, Tensor]:
    """Both sides depend on the weight, as both towers depend on their parameters."""
    images = F.normalize(given["images"][own] @ given["weight"], dim=-1)
    flat = given["texts"][own, :texts].flatten(0, 1)
    return images, F.normalize(flat @ given["weight"].t(), dim=-1)


def cases() -> list[tuple[str, str]]:
    """(loss, pairing)."""
    extra = [("contrast", "negatives"), ("distillation", "apart")]
    return [(loss, pairing) for loss in LOSSES[:2] for pairing in PAIRINGS] + extra


def texts_of(pairing: str) -> int:
    """Texts of each row."""
    return 2 if pairing in ("captions", "negatives") else 1


def ids_of(pairing: str) -> tuple[Tensor | None, Tensor | None]:
    if pairing == "negatives":  # every second text is nobody's, every tenth is left out
        keys = [i // 2 if i % 2 == 0 else (-1 if i % 10 == 1 else BATCH + i) for i in range(60)]
        return torch.arange(BATCH), torch.tensor(keys)
    return tuple(None if ids is None else torch.tensor(ids) for ids in PAIRINGS[pairing])  # type: ignore[return-value]


def teacher(given: dict[str, Tensor], own: slice) -> tuple[Tensor, Tensor]:
    """Another model's features of the same rows."""
    sides = given["images"][own, :5], given["texts"][own, 0, 1:6]
    return F.normalize(sides[0], dim=-1), F.normalize(sides[1], dim=-1)


def run(rank: int, world: int, dtype: torch.dtype, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    found = {}
    for name, pairing in cases():
        given, texts = inputs(dtype), texts_of(pairing)
        leaves = [given[n].requires_grad_() for n in ("weight", "scale", "bias")]
        more: list[Any] = [given["bias"]] if name == "sigmoid_loss" else []
        if name == "distillation":
            more = [*(x.detach() for x in teacher(given, own)), 7.0]
        else:
            query_ids, key_ids = ids_of(pairing)
            of_texts = slice(own.start * texts, own.stop * texts)
            more.append(None if query_ids is None else query_ids[own])
            more.append(None if key_ids is None else key_ids[of_texts])
        loss = getattr(losses, name)(*features(given, own, texts), given["scale"], *more)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        row = [loss.detach(), *(torch.zeros(1) if g is None else g for g in grads)]
        mean = [x.double().clone() for x in row]
        for x in mean:
            torch.distributed.all_reduce(x)
        found[f"{name}, {pairing}"] = [(x / world).flatten().tolist() for x in mean]
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
