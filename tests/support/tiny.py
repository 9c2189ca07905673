"""Settings of a training run that is small enough for a unit test, and a function that runs it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from stages import stage_class
from xray.config import loading as cfg

SMALL: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
        "keep_rate": 0.7,
        "keep_rate_span": [0.0, 0.5],
    },
    "data": {
        "resolution": 32,
        "frames": 4,
        "flip": False,
        "workers": 0,
        "sources": {
            "photos": {"shards": "photos", "modality": "image"},
            "clips": {"shards": "clips", "modality": "video"},
        },
        "blocks": [{"source": "photos", "samples": 8}, {"source": "clips", "samples": 4}],
    },
    "train": {"precision": "fp32", "samples": 72, "log_every": 1, "save_every": 3},
    "optim": {"name": "adamw", "base_lr": 0.02, "betas": [0.9, 0.95], "weight_decay": 0.05},
}
# For comparisons of runs whose sums have another order. With token reduction, rounding would decide
# which of two tokens with nearly equal scores is dropped, and the loss would change by 1e-4.
ALL_TOKENS = "model.keep_rate=1.0"
# Four steps of the clip stage: all tokens kept, no drop path, no periodic checkpoints.
QUICK = (ALL_TOKENS, "model.drop_path=0.0", "train.samples=48", "train.save_every=0")
OWN: dict[str, dict[str, Any]] = {
    "mae": {"mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}},
    "hashtag": {"hashtag": {"min_count": 2, "balance": "none"}},
    "text": {"text": {"lora_rank": 4, "lora_dropout": 0.0}},
    "clip": {"clip": {"embed_dim": 16, "adapter_blocks": 1}, "text": {"lora_rank": 0}},
}


def settings(stage: str, root: Path, out: Path, *overrides: str) -> Any:
    """Make a validated config of a stage on the demo data."""
    own = {**OWN[stage], "data": {"root": str(root)}, "out": str(out)}
    if stage in ("text", "clip"):
        own = cfg.merge(own, {"text": {"llm": str(root / "llm"), "max_length": 32}})
    layers = [SMALL, own, cfg.parse_overrides(overrides)]
    config = cfg.load_config(stage_class(stage).Config, stage, *layers)
    config.validate()
    return config


def train(stage: str, root: Path, out: Path, *overrides: str, init_from: Any = ()) -> Any:
    """Run a stage in this process and return its artifact."""
    import torch

    from xray.training.deepspeed_setup import init_distributed
    from xray.training.trainer import train_stage

    device = torch.device("cpu")
    init_distributed(device)
    config = settings(stage, root, out, *overrides)
    config.init_from = [str(path) for path in init_from]
    return train_stage(stage_class(stage), config, device)


def copy_run(artifact: Path, to: Path) -> Path:
    """Copy an artifact's whole run, with its checkpoints and logs, and return the new artifact."""
    shutil.copytree(artifact.parent, to)
    return to / artifact.name
