"""Training runs of two processes: stages with each ZeRO stage, and resumes with another one.

usage: torchrun --nproc_per_node 2 two_process.py DEMO OUT quick|whole
OUT must contain runs of one process that were stopped halfway, `STAGE-joined-ZERO`. All runs use
one process group, one after another.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tiny import ALL_TOKENS, SMALL, train

from xray import dist

LORA = ["text.tune=lora", "text.lora_rank=2", "text.lora_dropout=0.0"]
WHOLE = [(stage, zero) for stage in ("mae", "hashtag", "clip") for zero in (0, 1, 2, 3)]
QUICK = [("mae", 3), ("clip", 0), ("clip", 1), ("clip", 3)]
# Runs without a resume.
QUICK_MORE = [
    ("hashtag", 3),
    ("sigmoid", 1),
    ("text", 2),
    ("lora", 3),
    ("uncaptioned", 2),
    ("uncaptioned", 3),
]
MORE = [*QUICK_MORE, ("pooled", 3), ("rotary", 3), ("one_batch", 0), ("lora", 1)]
MOVES = [(stage, a, b) for stage, a in WHOLE for b in (0, 1, 2, 3) if a != b]
# Stage of runs that have another name.
STAGES = {
    "sigmoid": "clip",
    "one_batch": "clip",
    "pooled": "hashtag",
    "rotary": "mae",
    "lora": "clip",
    "uncaptioned": "clip",
}
# Settings that must not change the result. Without the threshold of 0, ZeRO 3 would not shard so
# small a model.
WITHOUT_EFFECT = {
    0: [],
    1: ["train.save_in_background=true"],
    2: ["zero.offload=true"],
    3: [
        "train.save_in_background=true",
        "zero.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
        "model.grad_checkpointing=true",
    ],
}
# Another model than that of SMALL does not take its kwargs.
KWARGS = f"model.kwargs={json.dumps(SMALL['model']['kwargs'])}"
# In the mae stage, sizes of samples and micro-batches change at one third and two thirds.
CHANGES = {
    "mae": ["data.resolution=[[0.0,16],[0.6,32]]", "train.micro_batch=[[0.0,0],[0.3,2]]"],
    "hashtag": [
        ALL_TOKENS,
        "hashtag.chunk=3",
        "model.video=frames",
        "model.frame_pool=attention",
    ],
    # two captions per sample; blocks of 8 and 4 samples in micro-batches of 2
    "clip": [ALL_TOKENS, *LORA, "clip.captions=2", "train.micro_batch=2"],
    "sigmoid": [ALL_TOKENS, "clip.loss=sigmoid", "clip.matryoshka=[4]", "optim.vision.freeze=0.4"],
    # EViT scores the tokens by weights of the pooling head, outside of its forward pass
    "pooled": ["model.name=vit_base_patch16_siglip_224", KWARGS, "model.pool=map"],
    "rotary": ["model.name=eva02_tiny_patch14_224", KWARGS],
    "lora": [ALL_TOKENS, "optim.vision.tune=lora", "train.micro_batch=2"],  # of the image tower
    # The first and the last micro-batches do not reach the text tower.
    "uncaptioned": [
        ALL_TOKENS,
        *LORA,
        "train.micro_batch=2",
        "data.sources.more={shards: heldout, modality: image}",
        "data.blocks=[{source: clips, samples: 4}, {source: photos, samples: 8}, "
        "{source: more, samples: 4}]",
        "train.samples=96",
        "clip={uncaptioned: [clips, more], mae_weight: 0.5, hashtag_weight: 0.25}",
        "mae={decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}",
        "hashtag.min_count=2",
    ],
    "one_batch": ["debug.overfit_batch=true"],
    "text": [*LORA, "data.blocks=[{source: photos, samples: 12}]", "train.micro_batch=3"],
}


def halfway(run: Path, to: Path) -> Path:
    """Copy a run of six steps in the state after three steps."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("artifact", "step_00000006", "tb"))
    return to


def settings(stage: str, zero: int) -> list[str]:
    """Return the overrides of a run."""
    return [f"zero.stage={zero}", *WITHOUT_EFFECT[zero], *CHANGES[stage]]


def main() -> None:
    """Train all runs, then resume copies of them and of the runs of one process."""
    demo, out = Path(sys.argv[1]), Path(sys.argv[2])
    quick = sys.argv[3] == "quick"
    cells, more = (QUICK, QUICK_MORE) if quick else (WHOLE, MORE)
    for stage, zero in dict.fromkeys([*cells, *more]):
        folder = out / f"{stage}-{zero}"
        train(STAGES.get(stage, stage), demo, folder, *settings(stage, zero))
    again = [(stage, zero, zero) for stage, zero in cells]
    again += [] if quick else MOVES

    def begin() -> None:
        for stage, a, b in again:
            halfway(out / f"{stage}-{a}", out / f"{stage}-{a}-to-{b}")

    dist.on_main(begin)
    for stage, a, b in again:
        train(stage, demo, out / f"{stage}-{a}-to-{b}", *settings(stage, b))
    for stage, zero in cells:
        train(stage, demo, out / f"{stage}-joined-{zero}", *settings(stage, zero))
    dist.leave()


if __name__ == "__main__":
    main()
