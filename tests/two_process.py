"""Cells run one after another by each of two processes, in one process group.

usage: torchrun --nproc_per_node 2 two_process.py DEMO OUT
OUT may hold runs of one process that were stopped halfway, `STAGE-joined-ZERO`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny import ALL_TOKENS, train

from xray import dist
from xray.losses import gather_rows, info_nce

LORA = ["text.tune=lora", "text.lora_rank=2", "text.lora_dropout=0.0"]
ZERO = [
    *(("mae", zero) for zero in (0, 1, 2, 3)),
    ("hashtag", 3),
    *(("clip", zero) for zero in (0, 1, 2, 3)),
    ("sigmoid", 1),
    ("one_batch", 0),
    ("text", 2),
]
# Taken up again after three of six steps: (cell, its ZeRO stage before, and after).
GO_ON = [
    *(("mae", a, b) for a, b in ((0, 0), (1, 3), (3, 0))),
    *(("clip", a, b) for a, b in ((0, 1), (1, 1), (3, 3))),
]
JOINED = [("mae", 0), ("mae", 3), ("clip", 1), ("clip", 3)]  # what one process began with ZeRO 0
STAGES = {"sigmoid": "clip", "one_batch": "clip"}  # where it is not the cell's name
# The sizes of samples and micro-batches change at a third and at two thirds of the mae stage.
CHANGES = {
    "mae": ["data.resolution=[[0.0,16],[0.6,32]]", "train.micro_batch=[[0.0,0],[0.3,2]]"],
    "hashtag": [
        "hashtag.chunk=3",
        "model.reduce=tome",
        "model.video=frames",
        "model.frame_pool=attention",
    ],
    # two captions of each sample; blocks of 8 and 4 in micro-batches of 2
    "clip": [ALL_TOKENS, *LORA, "clip.captions=2", "train.micro_batch=2"],
    "sigmoid": [ALL_TOKENS, "clip.loss=sigmoid", "clip.matryoshka=[4]", "optim.vision.freeze=0.4"],
    "one_batch": ["debug.overfit_batch=true"],
    "text": [*LORA, "data.blocks=[{source: photos, samples: 12}]", "train.micro_batch=3"],
}


def halfway(run: Path, to: Path) -> Path:
    """A copy of a run of six steps as it was after three."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("artifact", "step_00000006", "tb"))
    return to


def contrastive_gradients(out: Path) -> None:
    """Own-rows InfoNCE in float64: what each rank's gradient is after the engine's mean."""
    torch.manual_seed(0)
    images, texts = torch.randn(2, 6, 5, dtype=torch.float64)
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    world, rank = dist.world_size(), dist.rank()
    own = slice(rank * 6 // world, (rank + 1) * 6 // world)
    a = F.normalize(images[own] @ weight, dim=-1)
    b = F.normalize(texts[own] @ weight.t(), dim=-1)
    loss = info_nce(a, b, scale.exp())
    grads = torch.autograd.grad(loss, [weight, scale])
    facts = [dist.sum_over_ranks(x.detach().clone()) / world for x in (loss, *grads)]
    assert len(gather_rows(a)) == 6
    if dist.is_main():
        out.write_text(json.dumps([fact.tolist() for fact in facts]))


def main() -> None:
    demo, out = Path(sys.argv[1]), Path(sys.argv[2])
    for stage, zero in ZERO:
        more = [f"zero.stage={zero}", f"model.grad_checkpointing={zero == 3}"]
        train(STAGES.get(stage, stage), demo, out / f"{stage}-{zero}", *more, *CHANGES[stage])
    again = [(stage, f"{stage}-{a}-to-{b}", b) for stage, a, b in GO_ON]
    if dist.is_main():
        for stage, a, b in GO_ON:
            halfway(out / f"{stage}-{a}", out / f"{stage}-{a}-to-{b}")
    dist.barrier()
    for stage, name, zero in [*again, *((s, f"{s}-joined-{b}", b) for s, b in JOINED)]:
        train(stage, demo, out / name, f"zero.stage={zero}", *CHANGES[stage])
    contrastive_gradients(out / "gradients.json")
    dist.leave()


if __name__ == "__main__":
    main()
